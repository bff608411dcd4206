internal import ArgumentParser
internal import QCOW2

/// `qcowfs compare`: whether two disks hold the same bytes.
struct Compare: Verb {
    static let configuration = CommandConfiguration(
        commandName: "compare",
        abstract: "Say whether two disks hold the same bytes.",
        discussion: "Exit status: 0 equal, 1 different, 2 not compared.")

    static let failureStatus: Int32 = 2

    @Option(
        name: .customShort("f"),
        help: ArgumentHelp(
            "The first disk's format; found by its magic without.", valueName: "format"))
    var firstFormat: DiskFormat?

    @Option(
        name: .customShort("F"),
        help: ArgumentHelp("The second disk's format.", valueName: "format"))
    var secondFormat: DiskFormat?

    @Flag(name: .customShort("s"), help: "Disks of different sizes are different.")
    var isStrict = false

    @OptionGroup var sources: SourceOptions
    @OptionGroup var output: OutputOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The first disk.", completion: .file())
    var first: String

    @Argument(help: "The second disk.", completion: .file())
    var second: String

    func perform() throws -> Int32 {
        let one = try sources.open(first, format: firstFormat)
        let other = try sources.open(second, format: secondFormat)
        let outcome = try progress.run(
            "compare", on: first, interrupted: "nothing was changed"
        ) { progress throws(ImageError) in
            try Comparison.compare(one, other, isStrict: isStrict, progress: progress)
        }
        let (a, b) = (one.size, other.size)
        try one.close()
        try other.close()
        switch output.form {
        case .json: print(Self.json(outcome, a, b).text)
        case .human: print(Self.text(outcome, a, b))
        }
        return outcome == .equal ? 0 : 1
    }

    private static func text(_ outcome: Comparison.Outcome, _ a: UInt64, _ b: UInt64) -> String {
        switch outcome {
        case .equal where a == b: "Images are identical."
        case .equal: "Images are identical, apart from their sizes (\(a) and \(b) bytes)."
        case .different(let offset): "Content mismatch at offset \(offset)!"
        case .differentSizes: "Strict mode: Image sizes differ! (\(a) and \(b) bytes)"
        }
    }

    private static func json(_ outcome: Comparison.Outcome, _ a: UInt64, _ b: UInt64) -> JSON {
        var offset: UInt64?
        if case .different(let place) = outcome { offset = place }
        return .members([
            "identical": .boolean(outcome == .equal),
            "first-difference": offset.map { .number($0) },
            "virtual-sizes": .array([.number(a), .number(b)]),
        ])
    }
}
