internal import ArgumentParser
internal import QCOW2

/// `qcowfs create`: makes an empty image.
struct Create: Verb {
    static let configuration = CommandConfiguration(
        commandName: "create",
        abstract: "Make an empty image.",
        discussion: """
            Options of -o: size, compat (0.10, 1.1, v2, v3), cluster_size, refcount_bits, \
            lazy_refcounts, extended_l2, compression_type (zlib, zstd), preallocation (off, \
            metadata, falloc, full), backing_file, backing_fmt, data_file, data_file_raw, \
            encrypt.format (luks), encrypt.cipher-alg, encrypt.cipher-mode, encrypt.ivgen-alg, \
            encrypt.ivgen-hash-alg, encrypt.hash-alg, encrypt.iter-time (milliseconds). Backing \
            file and data file are found relative to the image; the data file is made too. What \
            is switched is on or off; yes and no, true and false, y and n mean the same.
            """)

    @Option(name: .shortAndLong, help: "The format; only qcow2.", completion: .list(["qcow2"]))
    var format = "qcow2"

    @Option(
        name: [.customShort("o"), .customLong("option")],
        help: ArgumentHelp("Set options of the image.", valueName: "OPT=VALUE,..."))
    var options: [String] = []

    @Option(
        name: [.customShort("b"), .customLong("backing")],
        help: "The backing file, found relative to the image.", completion: .file())
    var backing: String?

    @Option(
        name: [.customShort("F"), .customLong("backing-format")],
        help: "The backing file's format: raw or qcow2.", completion: .list(["raw", "qcow2"]))
    var backingFormat: String?

    @Flag(
        name: [.customShort("u"), .customLong("unsafe")],
        help: "Do not open the backing file; it need not exist.")
    var isUnsafe = false

    @OptionGroup var passphrases: PassphraseOptions

    @Flag(name: .shortAndLong, help: "Nothing is printed in any case; for habit's sake.")
    var quiet = false

    @Argument(help: "The file to make; one that is there is replaced.", completion: .file())
    var image: String

    @Argument(help: "The size of the disk; the backing file's where it is left out.")
    var size: ByteSize?

    func perform() throws -> Int32 {
        guard format == "qcow2" else {
            throw Failure(image, "format \(format) cannot be created, only qcow2 can")
        }
        var wanted = NewImageOptions(image: image)
        wanted.options.backingFile = backing
        wanted.options.backingFormat = backingFormat
        wanted.options.opensBackingFile = !isUnsafe
        wanted.byteCount = size?.byteCount
        try wanted.read(options)
        let made = try wanted.complete { try passphrases.forNewImage(image) }
        try Image.create(at: image, size: wanted.byteCount, options: made)
        return 0
    }
}
