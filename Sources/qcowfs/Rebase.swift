internal import ArgumentParser
internal import QCOW2

/// `qcowfs rebase`: puts another backing file under an image.
struct Rebase: Verb {
    static let configuration = CommandConfiguration(
        commandName: "rebase",
        abstract: "Put another backing file under an image, whose disk stays as it is.")

    @Flag(
        name: .customShort("u"),
        help: "Change the name in the header and nothing else; the disk may become another one.")
    var isUnsafe = false

    @Option(
        name: .customShort("b"),
        help: ArgumentHelp(
            "The backing file, found relative to the image; '' for none.", valueName: "file"),
        completion: .file())
    var backing: String

    @Option(
        name: .customShort("F"),
        help: ArgumentHelp("Its format; found by its magic without.", valueName: "format"))
    var format: DiskFormat?

    @OptionGroup var policy: PolicyOptions
    @OptionGroup var passphrases: PassphraseOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        try progress.run(
            "rebase", on: image, interrupted: "it keeps its backing file, and its disk is the same"
        ) { progress throws(ImageError) in
            try QCOW2.Rebase.run(
                path: image, onto: backing.isEmpty ? nil : backing, format: format?.source,
                isUnsafe: isUnsafe,
                options: OpenOptions(policy: policy.policy, passphrases: try passphrases.source()),
                threadCount: Processors.count, progress: progress)
        }
        return 0
    }
}
