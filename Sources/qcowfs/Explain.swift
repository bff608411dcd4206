internal import ArgumentParser
internal import QCOW2

/// `qcowfs explain`: how one byte of a disk is found.
struct Explain: Verb {
    static let configuration = CommandConfiguration(
        commandName: "explain",
        abstract:
            "Say how a byte of the disk is found: file, L1 and L2 entry, host offset, counts.",
        discussion: "Tables are shown as they are on disk, also where they make no sense.")

    @OptionGroup var output: OutputOptions

    @Option(
        name: .customShort("l"),
        help: ArgumentHelp(
            "Look at this internal snapshot, by identifier or name.", valueName: "snapshot"))
    var snapshot: String?

    @OptionGroup var policy: PolicyOptions

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Look at an image that another program writes.")
    var isShared = false

    @Argument(help: "The image.", completion: .file())
    var image: String

    @Argument(help: "Which byte of the disk: 4096, 0x1000, 1M.")
    var offset: DiskOffset

    func perform() throws -> Int32 {
        let explanation = try Explanation(
            path: image, offset: offset.byteCount, snapshot: snapshot, policy: policy.policy,
            locking: isShared ? .forceShare : .required)
        switch output.form {
        case .json: print(ExplainReport.json(explanation).text)
        case .human: print(ExplainReport.text(explanation))
        }
        guard let obstacle = explanation.obstacle else { return 0 }
        Failure.print("explain: \(obstacle)")
        return 1
    }
}

/// A place on a disk, also in hexadecimal digits.
struct DiskOffset: ExpressibleByArgument {
    let byteCount: UInt64

    init?(argument: String) {
        if argument.hasPrefix("0x"), let number = UInt64(argument.dropFirst(2), radix: 16) {
            byteCount = number
        } else if let size = ByteSize(argument: argument) {
            byteCount = size.byteCount
        } else {
            return nil
        }
    }
}
