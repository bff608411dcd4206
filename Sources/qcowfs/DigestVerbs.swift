internal import ArgumentParser
internal import QCOW2

/// `qcowfs sha256`: the hash of a disk, as sha256sum of the raw file would give it.
struct SHA256: Verb {
    static let configuration = CommandConfiguration(
        commandName: "sha256",
        abstract: "Print the SHA-256 of the disk, as sha256sum of the raw file would.")

    @OptionGroup var options: DigestOptions

    func perform() throws -> Int32 { try options.run(.sha256, verb: "sha256") }
}

/// `qcowfs sha1`: the same with SHA-1.
struct SHA1: Verb {
    static let configuration = CommandConfiguration(
        commandName: "sha1",
        abstract: "Print the SHA-1 of the disk, as sha1sum of the raw file would.")

    @OptionGroup var options: DigestOptions

    func perform() throws -> Int32 { try options.run(.sha1, verb: "sha1") }
}

/// What both take.
struct DigestOptions: ParsableArguments {
    @Option(
        name: .customShort("f"),
        help: ArgumentHelp("The format, qcow2 without.", valueName: "format"))
    var format = DiskFormat.qcow2

    @OptionGroup var sources: SourceOptions
    @OptionGroup var output: OutputOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    func run(_ algorithm: DiskDigest.Algorithm, verb: String) throws -> Int32 {
        let disk = try sources.open(image, format: format)
        let digest = try progress.run(
            verb, on: image, interrupted: "nothing was changed"
        ) { progress throws(ImageError) in
            try DiskDigest.compute(algorithm, of: disk, progress: progress)
        }
        try disk.close()
        let text = digest.map { byte in
            (byte < 16 ? "0" : "") + String(byte, radix: 16)
        }.joined()
        switch output.form {
        case .json:
            print(JSON.object([("filename", .string(image)), (verb, .string(text))]).text)
        case .human: print("\(text)  \(image)")
        }
        return 0
    }
}
