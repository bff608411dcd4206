internal import ArgumentParser
internal import QCOW2

/// `qcowfs compact`: moves clusters into free space and shortens the file.
struct Compact: Verb {
    static let configuration = CommandConfiguration(
        commandName: "compact",
        abstract: "Move clusters into free space and shrink the file.",
        discussion: """
            The disk, its snapshots and its bitmaps stay. No space is needed but the file's own, \
            and whenever the work is interrupted the image is whole. Clusters full of zeros are \
            not looked for: qcowfs discard gives those back first.
            """)

    @OptionGroup var passphrases: PassphraseOptions
    @OptionGroup var output: OutputOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The image.")
    var image: String

    func perform() throws -> Int32 {
        let source = try passphrases.source()
        let done = try progress.run(
            "compact", on: image,
            interrupted: "the image is whole, and what was moved so far stays moved"
        ) { progress throws(ImageError) in
            try Image.compact(image, passphrases: source, progress: progress)
        }
        switch output.form {
        case .json: print(json(done).text)
        case .human: print(text(done))
        }
        return 0
    }

    private func json(_ done: Compaction) -> JSON {
        .object([
            ("filename", .string(image)),
            ("format", .string("qcow2")),
            ("old-file-size", .number(done.oldByteCount)),
            ("new-file-size", .number(done.newByteCount)),
            ("moved-clusters", .number(done.movedClusterCount)),
            ("freed-tables", .number(done.freedTableCount)),
            ("leaks-fixed", .number(done.freedLeakCount)),
        ])
    }

    private func text(_ done: Compaction) -> String {
        if done.isNothing { return "Nothing to do: the file has no free space before its end." }
        let saved = done.oldByteCount - min(done.newByteCount, done.oldByteCount)
        return "\(done.movedClusterCount) clusters moved. "
            + "The file has \(ByteSize(byteCount: done.newByteCount)) now, "
            + "\(ByteSize(byteCount: saved)) less."
    }
}
