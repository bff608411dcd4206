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

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        let disk = try Image.open(
            image,
            options: OpenOptions(
                policy: policy.policy, passphrases: try passphrases.source()))
        defer { try? disk.close() }
        let freed = try progress.run(
            "discard", on: image, interrupted: "what was found so far is given back"
        ) { progress throws(ImageError) in
            do throws(ImageError) {
                let freed = try ZeroReclaim.run(
                    on: disk, threadCount: Processors.count, progress: progress)
                try disk.close()
                return freed
            } catch {
                if error.kind == .cancelled { try disk.close() }
                throw error
            }
        }
        switch output.form {
        case .json: print(JSON.object([("discarded", .number(freed))]).text)
        case .human: print("\(ByteSize(byteCount: freed)) given back")
        }
        return 0
    }
}
