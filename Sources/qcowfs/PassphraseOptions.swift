internal import ArgumentParser
internal import QCOW2

/// `--passphrase-file`, for every verb that reads guest data.
struct PassphraseOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "The passphrase of an encrypted image; given several times, each is tried on each "
                + "encrypted file of the backing chain.",
            valueName: "file"), completion: .file())
    var passphraseFile: [String] = []

    /// The files' content, or a question at the terminal where there are none.
    func source() throws(ImageError) -> PassphraseSource {
        var source = PassphraseSource(question: PassphraseQuestion.ask)
        for file in passphraseFile {
            source.passphrases.append(try Passphrase.read(fromFile: file))
        }
        return source
    }

    /// The passphrase for a new image, typed twice where it is typed.
    func forNewImage(_ image: String) throws -> Passphrase {
        guard passphraseFile.count < 2 else {
            throw Failure(
                image, "a new image has one passphrase, \(passphraseFile.count) are given")
        }
        if let file = passphraseFile.first { return try Passphrase.read(fromFile: file) }
        guard let first = try PassphraseQuestion.ask(image),
            let second = try PassphraseQuestion.ask(image, again: true)
        else { throw ImageError(.encryption(.passphraseNeeded), file: image) }
        guard first == second else { throw Failure(image, "the passphrases differ") }
        return first
    }
}
