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

    @Argument(help: "The image.")
    var image: String

    func perform() throws -> Int32 {
        let bar = progress.report(of: "commit")
        Interruption.watch()
        do throws(ImageError) {
            try BackingCommit.run(
                path: image,
                options: OpenOptions(
                    policy: policy.policy, passphrases: try passphrases.source()),
                empties: !keepsImage
            ) {
                bar?.update($0)
                return !Interruption.hasCome
            }
        } catch {
            bar?.clear()
            guard error.kind == .cancelled else { throw error }
            throw Failure(image, "interrupted; the image is as it was, commit it again")
        }
        bar?.finish()
        print("Image committed.")
        return 0
    }
}
