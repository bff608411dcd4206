internal import ArgumentParser
internal import QCOW2

/// `qcowfs write`: bytes of standard input onto a disk.
struct Write: Verb {
    static let configuration = CommandConfiguration(
        commandName: "write",
        abstract: "Write standard input onto a disk.",
        discussion: "It returns when the bytes are on stable storage.")

    @Option(help: "Where on the disk the bytes go.")
    var offset = ByteSize(byteCount: 0)

    @OptionGroup var policy: PolicyOptions
    @OptionGroup var passphrases: PassphraseOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        let disk = try Image.open(
            image,
            options: OpenOptions(policy: policy.policy, passphrases: try passphrases.source()))
        defer { try? disk.close() }
        Interruption.watch()
        var place = offset.byteCount
        guard place <= disk.size else {
            throw Failure(image, "the disk has \(disk.size) bytes: --offset \(place) is behind it")
        }
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        while !Interruption.hasCome {
            let count = try StandardStream.read(into: buffer)
            if count == 0 { break }
            let room = Int(min(UInt64(count), disk.size - place))
            try disk.write(UnsafeRawBufferPointer(rebasing: buffer[..<room]), at: place)
            place += UInt64(room)
            guard room == count else {
                throw Failure(image, "the disk ended at \(place) bytes; what fits was written")
            }
        }
        try disk.close()
        guard !Interruption.hasCome else {
            throw Failure(image, "interrupted; everything up to offset \(place) was written")
        }
        return 0
    }
}
