internal import ArgumentParser
internal import QCOW2

/// `qcowfs discard`: gives back clusters full of zeros.
struct Discard: Verb {
    static let configuration = CommandConfiguration(
        commandName: "discard",
        abstract: "Find clusters that hold nothing but zeros and give them back.")

    @OptionGroup var policy: PolicyOptions
    @OptionGroup var passphrases: PassphraseOptions
    @OptionGroup var output: OutputOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The image.")
    var image: String

    func perform() throws -> Int32 {
        let disk = try Image.open(
            image,
            options: OpenOptions(
                policy: policy.policy, passphrases: try passphrases.source()))
        defer { try? disk.close() }
        let bar = progress.report(of: "discard")
        Interruption.watch()
        do throws(ImageError) {
            let freed = try ZeroReclaim.run(on: disk, threadCount: Processors.count) {
                bar?.update($0)
                return !Interruption.hasCome
            }
            bar?.finish()
            try disk.close()
            switch output.form {
            case .json: print(JSON.object([("discarded", .number(freed))]).text)
            case .human: print("\(ByteSize(byteCount: freed)) given back")
            }
        } catch {
            bar?.clear()
            guard error.kind == .cancelled else { throw error }
            try disk.close()
            throw Failure(image, "interrupted; what was found so far is given back")
        }
        return 0
    }
}
