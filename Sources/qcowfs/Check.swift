internal import ArgumentParser
internal import QCOW2

/// `qcowfs check`: looks for damage in an image's tables.
struct Check: Verb {
    static let configuration = CommandConfiguration(
        commandName: "check",
        abstract: "Check an image's tables and reference counts, and repair them if told to.",
        discussion: "Exit status: 0 clean, 1 not checked, 2 corruptions found, 3 only leaks found.")

    @OptionGroup var output: OutputOptions

    @OptionGroup var progress: ProgressOptions

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Look at an image that another program writes; what it is doing may look like damage."
    )
    var isShared = false

    @Option(
        name: .shortAndLong,
        help: ArgumentHelp(
            "Free leaked clusters, or repair everything that leaves the disk's content as it is.",
            valueName: "leaks|all"))
    var repair: RepairScope?

    @Argument(help: "The image.", completion: .file())
    var image: String

    func validate() throws {
        if repair != nil && isShared {
            throw ValidationError("an image that another program writes cannot be repaired")
        }
    }

    func perform() throws -> Int32 {
        if let repair {
            return try Repairing(image: image, output: output, progress: progress).run(repair)
        }
        let bar = progress.report(of: "check")
        let findings = FindingLines(clearing: bar)
        let check = try ProgressOptions.run(bar, on: image, interrupted: "nothing was changed") {
            (progress) throws(ImageError) in
            try ImageCheck(
                path: image, locking: isShared ? .forceShare : .required, threadCount: 4,
                report: findings.add, progress: progress)
        }
        return try CheckReport(check: check, image: image).print(output.form, findings)
    }
}

/// `leaks` or `all`.
enum RepairScope: String, ExpressibleByArgument, CaseIterable {
    case leaks, all
}

/// The findings of a check, a line each on standard error.
///
/// They wait for the end of it: a check that has no result says so in one line, and nothing else.
final class FindingLines {
    /// More lines than this do not wait.
    private static let mostHeld = 1 << 16

    private var held: [String] = []
    private var areShown = false
    /// The first thing that could not be checked.
    private(set) var obstacle: String?
    private let bar: ProgressReport?

    init(clearing bar: ProgressReport?) { self.bar = bar }

    func add(_ finding: CheckFinding) {
        let text = Failure.oneLine(finding.description)
        if finding.severity == .unchecked {
            obstacle = obstacle ?? text
            return
        }
        held.append("\(finding.severity.word): \(text)\n")
        if areShown || held.count > Self.mostHeld { show() }
    }

    /// Prints what waits; what comes later does not wait.
    func show() {
        areShown = true
        if !held.isEmpty { bar?.clear() }
        for line in held { Failure.writeToStandardError(line) }
        held.removeAll()
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
struct CheckReport {
    let check: ImageCheck
    let image: String
    var fixedCorruptionCount: UInt64 = 0
    var fixedLeakCount: UInt64 = 0

    /// Prints the result and returns the exit status that it stands for.
    func print(_ form: OutputOptions.Form, _ findings: FindingLines) throws -> Int32 {
        guard check.errorCount == 0 else {
            let reason = findings.obstacle.map { ": \($0)" } ?? ""
            throw Failure(
                image,
                "\(check.errorCount) clusters could not be checked\(reason); "
                    + "repair counts all references anew")
        }
        findings.show()
        switch form {
        case .json: Swift.print(json.text)
        case .human: Swift.print(text)
        }
        return check.corruptionCount > 0 ? 2 : check.leakCount > 0 ? 3 : 0
    }

    /// Counts that are zero are left out, as qemu-img does.
    private var json: JSON {
        func number(_ value: UInt64) -> JSON? { value == 0 ? nil : .number(value) }
        return .members([
            "filename": .string(image),
            "format": .string("qcow2"),
            "check-errors": .number(check.errorCount),
            "image-end-offset": number(check.imageEndOffset),
            "corruptions": number(check.corruptionCount),
            "leaks": number(check.leakCount),
            "corruptions-fixed": number(fixedCorruptionCount),
            "leaks-fixed": number(fixedLeakCount),
            "total-clusters": number(check.totalClusterCount),
            "allocated-clusters": number(check.allocatedClusterCount),
            "fragmented-clusters": number(check.fragmentedClusterCount),
            "compressed-clusters": number(check.compressedClusterCount),
        ])
    }

    private var text: String {
        var lines: [String] = []
        if fixedCorruptionCount > 0 {
            lines.append("\(fixedCorruptionCount) errors were repaired.")
        }
        if fixedLeakCount > 0 { lines.append("\(fixedLeakCount) leaked clusters were freed.") }
        let found = lines.count
        if check.corruptionCount > 0 {
            lines.append(
                "\(check.corruptionCount) errors were found: data may be damaged, and writing to "
                    + "the image may damage more.")
        }
        if check.leakCount > 0 {
            lines.append(
                "\(check.leakCount) leaked clusters were found: they waste space and harm no data.")
        }
        if lines.count == found { lines.append("No errors were found.") }
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
    private func percent(_ part: UInt64, _ whole: UInt64) -> String {
        guard whole > 0 else { return "0.00%" }
        let hundredths = Int((Double(part) * 10000 / Double(whole)).rounded())
        let fraction = String(hundredths % 100)
        return "\(hundredths / 100).\(fraction.count < 2 ? "0" : "")\(fraction)%"
    }
}
