internal import ArgumentParser
internal import QCOW2

/// `qcowfs dehydrate`: an image's metadata without its data.
struct Dehydrate: Verb {
    static let configuration = CommandConfiguration(
        commandName: "dehydrate",
        abstract: "Keep an image's metadata without guest data, to share with a bug report.",
        discussion: """
            Header, extensions, tables, counts, snapshots and bitmaps are kept; guest data, \
            compressed or not, and key material are not.  It works on damaged images too.  \
            qcowfs rehydrate makes a sparse image of it again.
            """)

    @Flag(help: "Replace the names of backing and data files, snapshots and bitmaps.")
    var redactNames = false

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Look at an image that another program writes.")
    var isShared = false

    @OptionGroup var output: OutputOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    @Argument(help: "The file to make; one that is there is replaced.", completion: .file())
    var out: String

    func perform() throws -> Int32 {
        var dehydration = Dehydration()
        dehydration.redactsNames = redactNames
        let summary = try progress.run(
            "dehydrate", on: out,
            interrupted: "nothing was left there, and what was there stays"
        ) { [dehydration] progress throws(ImageError) in
            try dehydration.run(
                path: image, toFileAt: out, locking: isShared ? .forceShare : .required,
                progress: progress)
        }
        report(summary)
        return 0
    }

    private func report(_ summary: Dehydration.Summary) {
        switch output.form {
        case .json:
            print(
                JSON.object([
                    ("filename", .string(out)),
                    ("metadata-size", .number(summary.metadataByteCount)),
                    ("file-size", .number(summary.byteCount)),
                    ("omitted-entries", .number(summary.omittedEntryCount)),
                    ("notes", .array(summary.notes.map(JSON.string))),
                ]).text)
        case .human:
            let kept = ByteSize(byteCount: summary.metadataByteCount)
            print("\(kept) of metadata in \(ByteSize(byteCount: summary.byteCount))")
            if summary.omittedEntryCount > 0 {
                print(
                    "\(summary.omittedEntryCount) entries are left out: they might be guest data")
            }
            for note in summary.notes { print(Failure.oneLine(note)) }
        }
    }
}

/// `qcowfs rehydrate`: the image of such a file.
struct Rehydrate: Verb {
    static let configuration = CommandConfiguration(
        commandName: "rehydrate",
        abstract: "Make a sparse image of what dehydrate has kept; its data reads as zeros.")

    @Argument(help: "The file that dehydrate has made.", completion: .file())
    var source: String

    @Argument(help: "The image to make; one that is there is replaced.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        try Rehydration.run(path: source, toImageAt: image)
        return 0
    }
}
