internal import ArgumentParser
internal import QCOW2

/// `qcowfs check`: looks for damage in an image's tables.
struct Check: Verb {
    static let configuration = CommandConfiguration(
        commandName: "check",
        abstract: "Check an image's tables and reference counts, changing nothing.",
        discussion: "Exit status: 0 clean, 1 not checked, 2 corruptions found, 3 only leaks found.")

    @OptionGroup var output: OutputOptions

    @OptionGroup var progress: ProgressOptions

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Look at an image that another program writes; what it is doing may look like damage."
    )
    var isShared = false

    @Argument(help: "The image.")
    var image: String

    func perform() throws -> Int32 {
        let bar = progress.report(of: "check")
        let check = try ImageCheck(
            path: image, locking: isShared ? .forceShare : .required,
            report: {
                bar?.clear()
                let words = Failure.oneLine($0.description)
                Failure.writeToStandardError("\($0.severity.word): \(words)\n")
            }, progress: bar?.update)
        bar?.finish()
        guard check.errorCount == 0 else {
            throw Failure(image, "\(check.errorCount) clusters could not be checked")
        }
        switch output.form {
        case .json: print(CheckReport.json(check, image).text)
        case .human: print(CheckReport.text(check))
        }
        return check.corruptionCount > 0 ? 2 : check.leakCount > 0 ? 3 : 0
    }
}

extension CheckFinding.Severity {
    fileprivate var word: String {
        switch self {
        case .corruption: "corruption"
        case .leak: "leak"
        case .unchecked: "not checked"
        }
    }
}

/// What a check found, in the keys of `qemu-img check` or in lines.
private enum CheckReport {
    /// Counts that are zero are left out, as qemu-img does.
    static func json(_ check: ImageCheck, _ image: String) -> JSON {
        func number(_ value: UInt64) -> JSON? { value == 0 ? nil : .number(value) }
        return .members([
            "filename": .string(image),
            "format": .string("qcow2"),
            "check-errors": .number(check.errorCount),
            "image-end-offset": number(check.imageEndOffset),
            "corruptions": number(check.corruptionCount),
            "leaks": number(check.leakCount),
            "total-clusters": number(check.totalClusterCount),
            "allocated-clusters": number(check.allocatedClusterCount),
            "fragmented-clusters": number(check.fragmentedClusterCount),
            "compressed-clusters": number(check.compressedClusterCount),
        ])
    }

    static func text(_ check: ImageCheck) -> String {
        var lines: [String] = []
        if check.corruptionCount > 0 {
            lines.append(
                "\(check.corruptionCount) errors were found: data may be damaged, and writing to "
                    + "the image may damage more.")
        }
        if check.leakCount > 0 {
            lines.append(
                "\(check.leakCount) leaked clusters were found: they waste space and harm no data.")
        }
        if lines.isEmpty { lines.append("No errors were found.") }
        if check.allocatedClusterCount > 0 {
            let allocated = check.allocatedClusterCount
            lines.append(
                "\(allocated)/\(check.totalClusterCount) = "
                    + "\(percent(allocated, check.totalClusterCount)) allocated, "
                    + "\(percent(check.fragmentedClusterCount, allocated)) fragmented, "
                    + "\(percent(check.compressedClusterCount, allocated)) compressed clusters")
        }
        lines.append("Image end offset: \(check.imageEndOffset)")
        return lines.joined(separator: "\n")
    }

    /// Two decimals.
    private static func percent(_ part: UInt64, _ whole: UInt64) -> String {
        guard whole > 0 else { return "0.00%" }
        let hundredths = Int((Double(part) * 10000 / Double(whole)).rounded())
        let fraction = String(hundredths % 100)
        return "\(hundredths / 100).\(fraction.count < 2 ? "0" : "")\(fraction)%"
    }
}
