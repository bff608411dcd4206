internal import ArgumentParser
internal import QCOW2

/// `qcowfs map`: says where the bytes of a disk are.
struct Map: Verb {
    static let configuration = CommandConfiguration(
        commandName: "map",
        abstract: "List which file of the chain has which bytes of a disk, and where.",
        discussion: "For people, only what is stored is listed; JSON has everything.")

    @OptionGroup var output: OutputOptions

    @Flag(help: "Leave out what reads as zeros.")
    var ignoreZeroes = false

    @Option(
        help: ArgumentHelp("List what this dirty bitmap marks instead.", valueName: "name"))
    var bitmap: String?

    @Option(
        name: .shortAndLong, help: ArgumentHelp("Where to begin on the disk.", valueName: "offset"))
    var startOffset = ByteSize(byteCount: 0)

    @Option(
        name: [.customShort("l"), .long],
        help: ArgumentHelp("How many bytes to list.", valueName: "bytes"))
    var maxLength: ByteSize?

    @OptionGroup var source: SourceOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        // Where bytes lie is told without decrypting them.
        var options = try source.openOptions()
        options.passphrases = .locked
        let image = try Image.open(self.image, options: options)
        try list(image, range(on: image))
        try image.close()
        return 0
    }

    private func range(on image: Image) -> Range<UInt64> {
        let start = min(startOffset.byteCount, image.size)
        let rest = image.size - start
        return start..<start + min(maxLength?.byteCount ?? rest, rest)
    }

    private func list(_ image: Image, _ range: Range<UInt64>) throws {
        var listing = MapListing(output.form, files: image.dataFiles)
        listing.begin(isBitmap: bitmap != nil)
        if let bitmap {
            try image.forEachRange(markedBy: bitmap) { marked throws(ImageError) in
                let part = marked.clamped(to: range)
                if !part.isEmpty { listing.add(part) }
            }
            return try listing.end()
        }
        // A look at the option itself costs more than a run does.
        let ignoreZeroes = ignoreZeroes
        try image.forEachMappedExtent(in: range) { extent throws(ImageError) in
            if !(ignoreZeroes && extent.isZero) { listing.add(extent) }
        }
        try listing.end()
    }
}

/// The lines of a map, in the words of `qemu-img map`: there may be millions.
private struct MapListing {
    private let form: OutputOptions.Form
    private let files: [String]
    private let text = BulkText()
    private var isFirst = true

    init(_ form: OutputOptions.Form, files: [String]) {
        self.form = form
        self.files = files.map(Failure.oneLine)
    }

    mutating func begin(isBitmap: Bool) {
        switch form {
        case .human where isBitmap: text.add("Offset          Length\n")
        case .human: text.add("Offset          Length          Mapped to       File\n")
        case .json: text.add("[")
        }
    }

    mutating func add(_ extent: MappedExtent) {
        switch form {
        case .human: addLine(extent)
        case .json: addObject(extent)
        }
    }

    /// A range that a bitmap marks.
    mutating func add(_ range: Range<UInt64>) {
        let byteCount = range.upperBound - range.lowerBound
        switch form {
        case .human:
            text.add(hex: range.lowerBound, width: 16)
            text.add(hex: byteCount, width: 0)
            text.add("\n")
        case .json:
            beginObject(range.lowerBound, byteCount)
            text.add("}")
        }
    }

    private mutating func beginObject(_ start: UInt64, _ byteCount: UInt64) {
        text.add(isFirst ? "{ \"start\": " : ",\n{ \"start\": ")
        isFirst = false
        text.add(start)
        text.add(", \"length\": ")
        text.add(byteCount)
    }

    mutating func end() throws {
        if form == .json { text.add("]\n") }
        try text.finish()
    }

    private mutating func addLine(_ extent: MappedExtent) {
        guard extent.isData, !extent.isZero else { return }
        text.add(hex: extent.start, width: 16)
        text.add(hex: extent.byteCount, width: 16)
        if let offset = extent.offset {
            text.add(hex: offset, width: 16)
        } else {
            text.add(extent.isCompressed ? "compressed      " : "encrypted       ")
        }
        text.add(text: files[extent.depth])
        text.add("\n")
    }

    private mutating func addObject(_ extent: MappedExtent) {
        beginObject(extent.start, extent.byteCount)
        text.add(", \"depth\": ")
        text.add(UInt64(extent.depth))
        text.add(extent.isPresent ? ", \"present\": true" : ", \"present\": false")
        text.add(extent.isZero ? ", \"zero\": true" : ", \"zero\": false")
        text.add(extent.isData ? ", \"data\": true" : ", \"data\": false")
        if let offset = extent.offset {
            text.add(", \"offset\": ")
            text.add(offset)
        }
        text.add("}")
    }
}
