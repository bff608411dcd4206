internal import ArgumentParser
internal import QCOW2

/// `qcowfs audit`: what an untrusted image refers to and asks for.
struct Audit: Verb {
    static let configuration = CommandConfiguration(
        commandName: "audit",
        abstract: "Say what an untrusted image refers to and asks for.",
        discussion: """
            No other file is opened.  Exit status: 0 the image may be opened, 1 the policy, a \
            limit or an unknown feature refuses it (the report is printed all the same).
            """)

    @Option(help: "Print as JSON or for people.")
    var output = OutputOptions.Form.json

    @Flag(help: "The same as --output json.")
    var json = false

    @OptionGroup var policy: PolicyOptions

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Look at an image that another program writes.")
    var isShared = false

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        let audit = try ImageAudit(
            path: image, policy: policy.policy, locking: isShared ? .forceShare : .required)
        switch json ? .json : output {
        case .json: print(AuditReport.json(audit).text)
        case .human: print(AuditReport.text(audit))
        }
        guard let reason = audit.refusals.first else { return 0 }
        Failure.print("audit: \(image): \(reason)")
        return 1
    }
}
