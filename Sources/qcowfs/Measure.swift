internal import ArgumentParser
internal import QCOW2

/// `qcowfs measure`: how large a new file would be.
struct Measure: Verb {
    static let configuration = CommandConfiguration(
        commandName: "measure",
        abstract: "Say how many bytes a disk takes as a new file.")

    @Option(
        name: .customShort("O"), help: ArgumentHelp("The new file's format.", valueName: "format"))
    var targetFormat = DiskFormat.raw

    @Option(
        name: [.customShort("o"), .customLong("option")],
        help: ArgumentHelp("Options of the new image, as create has them.", valueName: "OPT=VALUE"))
    var options: [String] = []

    @Option(
        name: .customShort("f"),
        help: ArgumentHelp("The source's format; found by its magic without.", valueName: "format"))
    var sourceFormat: DiskFormat?

    @Option(help: "Bytes of an empty disk, instead of a source.")
    var size: ByteSize?

    @OptionGroup var output: OutputOptions
    @OptionGroup var sources: SourceOptions

    @Argument(help: "The disk to measure.", completion: .file())
    var source: String?

    func validate() throws {
        guard (size == nil) != (source == nil) else {
            throw ValidationError("give a disk or --size, and not both")
        }
    }

    func perform() throws -> Int32 {
        let disk = try source.map { try open($0) }
        let byteCount = disk?.size ?? size?.byteCount ?? 0
        let measured: Measurement
        if targetFormat == .raw {
            measured = Measurement(rawDiskOf: byteCount)
        } else {
            measured = try Measurement(
                imageOf: byteCount, holding: disk, options: newImageOptions())
        }
        try disk?.close()
        switch output.form {
        case .json:
            print(
                JSON.members([
                    "required": .number(measured.required),
                    "fully-allocated": .number(measured.fullyAllocated),
                    "bitmaps": measured.bitmaps.map { .number($0) },
                ]).text)
        case .human:
            print("required size: \(measured.required)")
            print("fully allocated size: \(measured.fullyAllocated)")
            if let bitmaps = measured.bitmaps { print("bitmaps size: \(bitmaps)") }
        }
        return 0
    }

    /// Where data is can be told without decrypting it.
    private func open(_ source: String) throws -> SourceDisk {
        var options = try sources.openOptions()
        options.passphrases = .locked
        return try SourceDisk(path: source, format: sourceFormat?.source, options: options)
    }

    private func newImageOptions() throws -> CreateOptions {
        var wanted = NewImageOptions(image: source ?? "")
        try wanted.read(options)
        // A LUKS header is as long whatever passphrase opens it.
        return try wanted.complete { try Passphrase.random() }
    }
}
