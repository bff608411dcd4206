internal import ArgumentParser
internal import Glibc
internal import QCOW2

/// `qcowfs read`: bytes of a disk to standard output.
struct Read: Verb {
    static let configuration = CommandConfiguration(
        commandName: "read", abstract: "Write bytes of a disk to standard output.")

    @Option(help: "Where on the disk the bytes begin.")
    var offset = ByteSize(byteCount: 0)

    @Option(help: "How many bytes; up to the end of the disk without.")
    var length: ByteSize?

    @OptionGroup var sources: SourceOptions

    @Option(
        name: .customShort("f"),
        help: ArgumentHelp("The format, qcow2 without.", valueName: "format"))
    var format = DiskFormat.qcow2

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        let disk = try sources.open(image, format: format)
        let start = offset.byteCount
        guard start <= disk.size else { throw outside(disk.size) }
        let count = length?.byteCount ?? disk.size - start
        guard count <= disk.size - start else { throw outside(disk.size) }
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        var done: UInt64 = 0
        while done < count {
            let part = UnsafeMutableRawBufferPointer(
                rebasing: buffer.prefix(Int(min(count - done, UInt64(buffer.count)))))
            try disk.read(into: part, at: start + done)
            try StandardStream.write(UnsafeRawBufferPointer(part))
            done += UInt64(part.count)
        }
        try disk.close()
        return 0
    }

    private func outside(_ size: UInt64) -> Failure {
        Failure(
            image,
            "the disk has \(size) bytes: --offset \(offset.byteCount) and --length "
                + "\(length?.byteCount ?? 0) end behind it")
    }
}

/// Bytes through standard input and output.
enum StandardStream {
    /// Writes all of `bytes` to standard output.
    static func write(_ bytes: UnsafeRawBufferPointer) throws(Failure) {
        var done = 0
        while done < bytes.count {
            let count = Glibc.write(
                STDOUT_FILENO, bytes.baseAddress.map { $0 + done }, bytes.count - done)
            if count > 0 {
                done += count
            } else if errno != EINTR {
                throw Failure("standard output", .last)
            }
        }
    }

    /// Fills `buffer` from standard input; fewer bytes only at its end.
    static func read(into buffer: UnsafeMutableRawBufferPointer) throws(Failure) -> Int {
        var done = 0
        while done < buffer.count {
            let count = Glibc.read(
                STDIN_FILENO, buffer.baseAddress.map { $0 + done }, buffer.count - done)
            if count == 0 { return done }
            if count > 0 {
                done += count
            } else if errno != EINTR {
                throw Failure("standard input", .last)
            }
        }
        return done
    }
}
