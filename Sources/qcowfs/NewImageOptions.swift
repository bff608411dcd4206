internal import QCOW2

/// What the lists of `-o` say of a new image.
struct NewImageOptions: ImageOptionReader {
    let image: String
    /// All but the encryption.
    var options = CreateOptions()
    var byteCount: UInt64?
    private var encryption: EncryptionWords

    init(image: String) {
        self.image = image
        encryption = EncryptionWords(image: image)
    }

    mutating func read(_ lists: [String]) throws {
        for (name, value) in lists.flatMap(OptionList.pairs) {
            if name == "size" {
                guard byteCount == nil else { throw Failure(image, "the size is given twice") }
                byteCount = try bytes(value, of: name)
            } else if EncryptionWords.has(name) {
                try encryption.set(name, to: value)
            } else {
                try set(name, to: value)
            }
        }
    }

    /// Everything, with the passphrase that `passphrase` gets where one is needed.
    func complete(passphrase: () throws -> Passphrase) throws -> CreateOptions {
        var complete = options
        complete.encryption = try encryption.options(passphrase)
        return complete
    }

    private mutating func set(_ name: String, to value: String) throws {
        switch name {
        case "compat": options.version = try version(value, of: name)
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
            guard options.backingFile == nil else {
                throw Failure(image, "the backing file is given twice")
            }
            options.backingFile = value
        case "backing_fmt":
            guard options.backingFormat == nil else {
                throw Failure(image, "the backing format is given twice")
            }
            options.backingFormat = value
        default:
            throw Failure(image, "there is no option '\(name)' (qcowfs help create lists them)")
        }
    }
}

extension NewImageOptions {
    /// The options of an image that another disk is copied to, or would be.
    static func ofCopy(
        _ lists: [String], to image: String, passphrases: PassphraseOptions
    ) throws -> CreateOptions {
        var wanted = NewImageOptions(image: image)
        try wanted.read(lists)
        guard wanted.byteCount == nil else {
            throw Failure(image, "the size is the source's and cannot be given")
        }
        guard wanted.options.backingFile == nil, wanted.options.backingFormat == nil else {
            throw Failure(image, "a copy has no backing file: rebase it afterwards")
        }
        return try wanted.complete { try passphrases.forNewImage(image) }
    }
}
