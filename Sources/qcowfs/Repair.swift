internal import ArgumentParser
internal import QCOW2

/// `qcowfs repair`: what `check --repair all` does, and the way back.
struct Repair: Verb {
    static let configuration = CommandConfiguration(
        commandName: "repair",
        abstract: "Repair an image's tables and reference counts (check --repair all).",
        discussion: """
            What the guest reads is never changed.  The metadata that is replaced is saved beside \
            the image; --undo puts it back as long as nothing has written to the image since.
            """)

    @OptionGroup var output: OutputOptions
    @OptionGroup var progress: ProgressOptions

    @Option(
        help: ArgumentHelp("Put back what an earlier repair replaced.", valueName: "file"),
        completion: .file())
    var undo: String?

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        guard let undo else {
            return try Repairing(image: image, output: output, progress: progress).run(.all)
        }
        try ImageRepair.undo(path: image, undoPath: undo)
        return 0
    }
}

/// A repair as both verbs run it.
struct Repairing {
    let image: String
    let output: OutputOptions
    let progress: ProgressOptions

    func run(_ scope: RepairScope) throws -> Int32 {
        let bar = progress.report(of: "check")
        let findings = FindingLines(clearing: bar)
        // What has begun to be written is written.
        let repair = try ProgressOptions.run(bar, on: image, interrupted: "nothing was changed") {
            (progress) throws(ImageError) in
            try ImageRepair(
                path: image, scope: scope == .all ? .all : .leaks, report: findings.add,
                announce: {
                    findings.show()
                    bar?.clear()
                    Failure.writeToStandardError("repair: \($0)\n")
                }, progress: progress)
        }
        if let undo = repair.undoPath {
            Failure.writeToStandardError(
                "repair: the old metadata is in \(undo): qcowfs repair --undo puts it back\n")
        }
        return try CheckReport(
            check: repair.check, image: image, fixedCorruptionCount: repair.fixedCorruptionCount,
            fixedLeakCount: repair.fixedLeakCount
        ).print(output.form, findings)
    }
}
