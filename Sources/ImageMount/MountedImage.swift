internal import Glibc
package import Logging
package import QCOW2

/// An open image with the semantics of a raw disk file: what a kernel may ask, answered with plain
/// values or the `errno` to give back.
///
/// Any method may be called from any thread.
package struct MountedImage: ~Copyable, Sendable {
    package let image: Image
    /// What messages call the image.
    package let path: String
    let rules: FileRules
    /// What takes the writes.
    let files: ImageFiles
    /// Each trouble is told once, however often a client runs into it.
    let log: TroubleLog

    package init(
        _ image: Image, path: String, writtenFile: String? = nil, rules: FileRules = FileRules(),
        logger: Logger
    ) {
        self.image = image
        self.path = path
        self.rules = rules
        files = ImageFiles(Set([writtenFile ?? path] + image.dataFiles.prefix(1)).sorted())
        log = TroubleLog(logger)
    }

    /// A snapshot of the image, with the same names and rules.
    borrowing func sharing(_ view: Image) -> MountedImage {
        MountedImage(view, path: path, rules: rules, files: files, log: log)
    }

    private init(
        _ image: Image, path: String, rules: FileRules, files: ImageFiles, log: TroubleLog
    ) {
        self.image = image
        self.path = path
        self.rules = rules
        self.files = files
        self.log = log
    }

    /// Bytes of the exposed file.
    package var size: UInt64 { image.size }

    /// How many bytes a read or write of `count` bytes at `offset` finds inside the disk.
    @inline(__always)
    package borrowing func clipped(_ count: Int, at offset: UInt64) -> Int {
        let size = image.size
        guard offset < size else { return 0 }
        return Int(truncatingIfNeeded: min(UInt64(clamping: count), size &- offset))
    }

    /// The part of `offset ..< offset + count` that lies inside the disk.
    borrowing func clippedRange(at offset: UInt64, count: UInt64) -> Range<UInt64> {
        let size = image.size
        let start = min(offset, size)
        return start..<(start &+ min(count, size &- start))
    }

    /// Runs an operation of the image and turns its error into the client's `errno`.
    @inline(__always)
    borrowing func attempt<Result: ~Copyable>(
        _ operation: () throws(ImageError) -> Result
    ) throws(SystemError) -> Result {
        do throws(ImageError) {
            return try operation()
        } catch {
            throw told(error)
        }
    }

    /// The `errno` of `error`, after the log has heard of it.
    @inline(never)
    package borrowing func told(_ error: ImageError) -> SystemError {
        log.report(error)
        return SystemError(code: error.code)
    }
}
