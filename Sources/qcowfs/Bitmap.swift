internal import ArgumentParser
internal import QCOW2

/// `qcowfs bitmap`: changes a persistent dirty bitmap of an image.
struct Bitmap: Verb {
    static let configuration = CommandConfiguration(
        commandName: "bitmap",
        abstract: "Change a dirty bitmap of an image.",
        discussion: """
            Several actions are done in the order in which they are given. `qcowfs info` lists an \
            image's bitmaps, `qcowfs map --bitmap` what one of them marks.
            """)

    enum Action: String, EnumerableFlag {
        case add, remove, clear, enable, disable

        static func help(for action: Action) -> ArgumentHelp? {
            switch action {
            case .add: "Make the bitmap, enabled and without a mark."
            case .remove: "Remove it."
            case .clear: "Take every mark away."
            case .enable: "Record what is written from now on."
            case .disable: "Record nothing from now on."
            }
        }
    }

    @Flag var actions: [Action] = []

    @Option(
        name: .customLong("merge"), parsing: .singleValue,
        help: ArgumentHelp("Mark also what this bitmap marks.", valueName: "source"))
    var sources: [String] = []

    @Option(
        name: [.customShort("b"), .long],
        help: ArgumentHelp("The image that has the bitmaps to merge.", valueName: "image"),
        completion: .file())
    var sourceFile: String?

    @Option(
        name: [.customShort("F"), .long], help: "That image's format; only qcow2.",
        completion: .list(["qcow2"]))
    var sourceFormat: String?

    @Option(
        name: .shortAndLong,
        help: ArgumentHelp("How many bytes a bit of a new bitmap stands for.", valueName: "bytes"))
    var granularity: ByteSize?

    @Option(
        name: .shortAndLong, help: "The image's format; only qcow2.", completion: .list(["qcow2"]))
    var format = "qcow2"

    @Argument(help: "The image.", completion: .file())
    var image: String

    @Argument(help: "The bitmap's name.")
    var bitmap: String

    func validate() throws {
        guard !actions.isEmpty || !sources.isEmpty else {
            throw ValidationError(
                "one of --add, --remove, --clear, --enable, --disable and --merge is needed")
        }
        guard granularity == nil || actions.contains(.add) else {
            throw ValidationError("--granularity belongs to --add")
        }
        guard sourceFile == nil || !sources.isEmpty else {
            throw ValidationError("--source-file belongs to --merge")
        }
        guard sourceFormat == nil || sourceFile != nil else {
            throw ValidationError("--source-format belongs to --source-file")
        }
    }

    func perform() throws -> Int32 {
        for format in [format, sourceFormat ?? "qcow2"] where format != "qcow2" {
            throw Failure(image, "images of the format \(format) have no bitmaps, only qcow2 has")
        }
        try Image.changeBitmap(bitmap, of: image, changes(ProgramStart.arguments))
        return 0
    }

    /// The changes in the order of the words on the command line: the parser keeps that of flags
    /// among each other only.
    private func changes(_ words: [String]) -> [BitmapChange] {
        var actions = actions[...]
        var sources = sources[...]
        var changes: [BitmapChange] = []
        for word in words.prefix(while: { $0 != "--" }) {
            if word == "--merge" || word.hasPrefix("--merge="), let source = sources.popFirst() {
                changes.append(.merge(source: source, path: sourceFile))
            } else if let action = actions.first, word == "--\(action.rawValue)" {
                actions.removeFirst()
                changes.append(change(action))
            }
        }
        return changes
    }

    private func change(_ action: Action) -> BitmapChange {
        switch action {
        case .add: .add(granularity: granularity?.byteCount)
        case .remove: .remove
        case .clear: .clear
        case .enable: .enable
        case .disable: .disable
        }
    }
}
