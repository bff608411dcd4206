internal import Glibc
internal import Synchronization

/// The file an image lies in, as the engine uses it: errors carry the file's name, bytes past the
/// end are zeros, and a failed sync is final.
package final class HostFile: Sendable {
    package let device: any BlockDevice
    package let name: String
    /// Every byte at or past this offset reads as zero, where the device promises that.
    private let end: Atomic<UInt64>
    /// The `errno` of the failure after which nothing is written any more, or 0.
    private let failure = Atomic<Int32>(0)
    package let readsZerosPastEnd: Bool

    package init(_ device: any BlockDevice) throws(ImageError) {
        self.device = device
        name = device.name
        readsZerosPastEnd = device.readsZerosPastEnd
        do throws(SystemError) {
            end = Atomic(try device.byteCount())
        } catch {
            throw ImageError(.system(error, operation: "cannot tell the length"), file: device.name)
        }
    }

    /// The end of every byte that was there at open or was ever written.
    @inline(__always)
    package var writtenEnd: UInt64 { end.load(ordering: .acquiring) }

    /// Whether all bytes from `offset` on are zeros that nobody ever wrote.
    package func isUntouched(from offset: UInt64) -> Bool {
        readsZerosPastEnd && offset >= writtenEnd
    }

    /// Fills `buffer`, with zeros past the end.
    package func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(ImageError) {
        do throws(SystemError) {
            try device.readPadded(into: buffer, at: offset)
        } catch {
            throw ImageError(.system(error, operation: "reading at offset \(offset)"), file: name)
        }
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
        try checkWritable()
        raiseEnd(to: offset &+ UInt64(bytes.count))
        do throws(SystemError) {
            try device.write(bytes, at: offset)
        } catch {
            throw ImageError(.system(error, operation: "writing at offset \(offset)"), file: name)
        }
    }

    /// Before a write is tried: where it may have left bytes, nothing is known to be zero.
    @inline(__always)
    func raiseEnd(to offset: UInt64) {
        // Looked at first, so that writers inside of the file share the line.
        if offset > writtenEnd { end.max(offset, ordering: .acquiringAndReleasing) }
    }

    package func write(_ bytes: [UInt8], at offset: UInt64) throws(ImageError) {
        try bytes.span.withUnsafeBytes { bytes throws(ImageError) in try write(bytes, at: offset) }
    }

    /// Makes sure that `range`, whose bytes nobody needs, lies inside of the file and has space.
    package func reserve(_ range: Range<UInt64>) throws(ImageError) {
        try checkWritable()
        raiseEnd(to: range.upperBound)
        do throws(SystemError) {
            try device.reserve(range)
        } catch .notSupported {
            try writeZeroes(range)
        } catch {
            throw ImageError(
                .system(error, operation: "reserving space at offset \(range.lowerBound)"),
                file: name)
        }
    }

    /// Takes space for `range` where the device can; what it reads stays.
    package func reserveKeepingBytes(_ range: Range<UInt64>) throws(ImageError) {
        try checkWritable()
        do throws(SystemError) {
            try device.reserve(range)
            raiseEnd(to: range.upperBound)
        } catch .notSupported {
        } catch {
            throw ImageError(
                .system(error, operation: "reserving space at offset \(range.lowerBound)"),
                file: name)
        }
    }

    /// Makes `range` read as zeros, and gives its space back where the device can.
    package func unmap(_ range: Range<UInt64>) throws(ImageError) {
        try checkWritable()
        do throws(SystemError) {
            try device.punchHole(range)
        } catch {
            try writeZeroes(range)
        }
    }

    package func writeZeroes(_ range: Range<UInt64>) throws(ImageError) {
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = min(range.upperBound &- offset, UInt64(ZeroArea.byteCount))
            try write(UnsafeRawBufferPointer(rebasing: ZeroArea.bytes[..<Int(count)]), at: offset)
            offset &+= count
        }
    }

    /// Makes everything written durable.  A failure is final: the kernel may have dropped what it
    /// could not write, and a later sync would succeed without it.
    package func flush() throws(ImageError) {
        try checkWritable()
        do throws(SystemError) {
            try device.flush()
        } catch {
            failure.store(EIO, ordering: .releasing)
            throw ImageError(.system(error, operation: "sync failed, no more writes"), file: name)
        }
    }

    /// Gives space back where the device can; the bytes may or may not be zero afterwards.
    package func punchHole(_ range: Range<UInt64>) {
        guard failure.load(ordering: .acquiring) == 0 else { return }
        // Space that cannot be given back is no error: the clusters are free either way.
        do throws(SystemError) { try device.punchHole(range) } catch {}
    }

    package func resize(to byteCount: UInt64) throws(ImageError) {
        try checkWritable()
        do throws(SystemError) {
            try device.resize(to: byteCount)
        } catch {
            throw ImageError(
                .system(error, operation: "cannot change the file's length"), file: name)
        }
        end.store(byteCount, ordering: .releasing)
    }

    /// Throws once a sync has failed or the image was found damaged.
    @inline(__always)
    package func checkWritable() throws(ImageError) {
        let code = failure.load(ordering: .acquiring)
        if code != 0 { throw ImageError(.failed(SystemError(code: code)), file: name) }
    }

    /// No more writes from here on.
    package func stopWriting() { failure.store(EIO, ordering: .releasing) }

    /// Bytes that the file takes on its file system, 0 where that is not known.
    package var allocatedByteCount: UInt64 {
        guard let device = device as? FileDevice else { return 0 }
        do throws(SystemError) { return try device.allocatedByteCount() } catch { return 0 }
    }

    package func corrupt(_ words: String) -> ImageError { ImageError(.corrupt(words), file: name) }
}
