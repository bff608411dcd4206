internal import ArgumentParser
internal import QCOW2

/// `qcowfs commit`: writes an overlay's content into its backing file.
struct Commit: Verb {
    static let configuration = CommandConfiguration(
        commandName: "commit",
        abstract: "Write an image's content into its backing file, and empty the image.")

    @Flag(name: .customShort("d"), help: "Leave the image as it is.")
    var keepsImage = false

    @OptionGroup var policy: PolicyOptions
    @OptionGroup var passphrases: PassphraseOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        try progress.run(
            "commit", on: image, interrupted: "the image is as it was, commit it again"
        ) { progress throws(ImageError) in
            try BackingCommit.run(
                path: image,
                options: OpenOptions(policy: policy.policy, passphrases: try passphrases.source()),
                empties: !keepsImage, progress: progress)
        }
        print("Image committed.")
        return 0
    }
}
