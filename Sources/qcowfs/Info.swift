internal import ArgumentParser
internal import QCOW2

/// `qcowfs info`: says what an image is.
struct Info: Verb {
    static let configuration = CommandConfiguration(
        commandName: "info", abstract: "Say what an image is, without opening any other file.")

    @OptionGroup var output: OutputOptions

    @Flag(help: "Show the backing files too.")
    var backingChain = false

    @OptionGroup var policy: PolicyOptions

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Look at an image that another program writes.")
    var isShared = false

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        let locking: OpenOptions.Locking = isShared ? .forceShare : .required
        let layers =
            backingChain
            ? try ImageInfo.chain(path: image, policy: policy.policy, locking: locking)
            : [try ImageInfo(path: image, locking: locking)]
        switch output.form {
        case .json:
            let objects = layers.map(InfoReport.json)
            print((backingChain ? JSON.array(objects) : objects[0]).text)
        case .human:
            print(layers.map(InfoReport.text).joined(separator: "\n\n"))
        }
        return 0
    }
}
