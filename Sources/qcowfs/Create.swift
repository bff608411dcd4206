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
            metadata, falloc, full), backing_file, backing_fmt, data_file, data_file_raw. Backing \
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
        for (name, value) in options.flatMap(OptionList.pairs) {
            if name == "size" {
                guard byteCount == nil else { throw Failure(image, "the size is given twice") }
                byteCount = try bytes(value, of: name)
            } else {
                try set(name, to: value, in: &wanted)
            }
        }
        try Image.create(at: image, size: byteCount, options: wanted)
        return 0
    }

    private func set(_ name: String, to value: String, in options: inout CreateOptions) throws {
        switch name {
        case "compat":
            options.version = try choice(
                value, of: name, ["0.10": .v2, "v2": .v2, "1.1": .v3, "v3": .v3])
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
        default: try setUnsupported(name, to: value, in: &options)
        }
    }

    /// Options that the library refuses by name, and those that nobody knows.
    private func setUnsupported(
        _ name: String, to value: String, in options: inout CreateOptions
    ) throws {
        switch name {
        case "encrypt.format": options.encryptionFormat = value
        case "encryption": options.encryptionFormat = try isOn(value, of: name) ? "aes" : nil
        default:
            throw Failure(image, "there is no option '\(name)' (qcowfs help create lists them)")
        }
    }

    private func bytes(_ value: String, of name: String) throws -> UInt64 {
        guard let size = ByteSize(argument: value) else {
            throw refused(value, of: name, "a number such as 512, 64k or 2M")
        }
        return size.byteCount
    }

    private func isOn(_ value: String, of name: String) throws -> Bool {
        try choice(value, of: name, ["on": true, "off": false])
    }

    private func choice<Value>(
        _ value: String, of name: String, _ choices: KeyValuePairs<String, Value>
    ) throws -> Value {
        guard let chosen = choices.first(where: { $0.key == value }) else {
            throw refused(value, of: name, choices.map(\.key).joined(separator: ", "))
        }
        return chosen.value
    }

    private func refused(_ value: String, of name: String, _ allowed: String) -> Failure {
        Failure(image, "\(name) cannot be '\(value)' (allowed: \(allowed))")
    }
}

/// The lists of `-o`: `name=value,name=value`; `,,` is a comma in a value, a name alone is `on`.
enum OptionList {
    static func pairs(_ list: String) -> [(name: String, value: String)] {
        var items: [String] = [""]
        var rest = list[...]
        while let character = rest.popFirst() {
            if character != "," {
                items[items.count - 1].append(character)
            } else if rest.first == "," {
                rest.removeFirst()
                items[items.count - 1].append(",")
            } else {
                items.append("")
            }
        }
        return items.filter { !$0.isEmpty }.map { item in
            guard let equals = item.firstIndex(of: "=") else { return (item, "on") }
            return (String(item[..<equals]), String(item[item.index(after: equals)...]))
        }
    }
}
