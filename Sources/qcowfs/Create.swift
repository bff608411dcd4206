internal import ArgumentParser
internal import QCOW2

/// `qcowfs create`: makes an empty image.
struct Create: Verb, ImageOptionReader {
    static let configuration = CommandConfiguration(
        commandName: "create",
        abstract: "Make an empty image.",
        discussion: """
            Options of -o: size, compat (0.10, 1.1, v2, v3), cluster_size, refcount_bits, \
            lazy_refcounts, extended_l2, compression_type (zlib, zstd), preallocation (off, \
            metadata, falloc, full), backing_file, backing_fmt, data_file, data_file_raw, \
            encrypt.format (luks), encrypt.cipher-alg, encrypt.cipher-mode, encrypt.ivgen-alg, \
            encrypt.ivgen-hash-alg, encrypt.hash-alg, encrypt.iter-time (milliseconds). Backing \
            file and data file are found relative to the image; the data file is made too.
            """)

    @Option(name: .shortAndLong, help: "The format; only qcow2.")
    var format = "qcow2"

    @Option(
        name: [.customShort("o"), .customLong("option")],
        help: ArgumentHelp("Set options of the image.", valueName: "OPT=VALUE,..."))
    var options: [String] = []

    @Option(
        name: [.customShort("b"), .customLong("backing")],
        help: "The backing file, found relative to the image.")
    var backing: String?

    @Option(
        name: [.customShort("F"), .customLong("backing-format")],
        help: "The backing file's format: raw or qcow2.")
    var backingFormat: String?

    @Flag(
        name: [.customShort("u"), .customLong("unsafe")],
        help: "Do not open the backing file; it need not exist.")
    var isUnsafe = false

    @OptionGroup var passphrases: PassphraseOptions

    @Flag(name: .shortAndLong, help: "Nothing is printed in any case; for habit's sake.")
    var quiet = false

    @Argument(help: "The file to make; one that is there is replaced.")
    var image: String

    @Argument(help: "The size of the disk; the backing file's where it is left out.")
    var size: ByteSize?

    func perform() throws -> Int32 {
        guard format == "qcow2" else {
            throw Failure(image, "format \(format) cannot be created, only qcow2 can")
        }
        var wanted = CreateOptions()
        wanted.backingFile = backing
        wanted.backingFormat = backingFormat
        wanted.opensBackingFile = !isUnsafe
        var byteCount = size?.byteCount
        var encryption = EncryptionWords(image: image)
        for (name, value) in options.flatMap(OptionList.pairs) {
            if name == "size" {
                guard byteCount == nil else { throw Failure(image, "the size is given twice") }
                byteCount = try bytes(value, of: name)
            } else if EncryptionWords.has(name) {
                try encryption.set(name, to: value)
            } else {
                try set(name, to: value, in: &wanted)
            }
        }
        wanted.encryption = try encryption.options { try passphrases.forNewImage(image) }
        try Image.create(at: image, size: byteCount, options: wanted)
        return 0
    }

    private func set(_ name: String, to value: String, in options: inout CreateOptions) throws {
        switch name {
        case "compat":
            options.version = try version(value, of: name)
        case "cluster_size": options.clusterByteCount = try bytes(value, of: name)
        case "refcount_bits": options.refcountBits = try bytes(value, of: name)
        case "lazy_refcounts": options.hasLazyRefcounts = try isOn(value, of: name)
        case "extended_l2": options.hasExtendedL2 = try isOn(value, of: name)
        case "data_file": options.dataFile = value
        case "data_file_raw": options.dataFileIsRaw = try isOn(value, of: name)
        case "compression_type":
            options.compressionType = try choice(
                value, of: name, ["zlib": .deflate, "deflate": .deflate, "zstd": .zstd])
        case "preallocation":
            guard let mode = CreateOptions.Preallocation(rawValue: value) else {
                throw refused(value, of: name, "off, metadata, falloc or full")
            }
            options.preallocation = mode
        case "backing_file":
            guard backing == nil else { throw Failure(image, "the backing file is given twice") }
            options.backingFile = value
        case "backing_fmt":
            guard backingFormat == nil else {
                throw Failure(image, "the backing format is given twice")
            }
            options.backingFormat = value
        default:
            throw Failure(image, "there is no option '\(name)' (qcowfs help create lists them)")
        }
    }
}
