internal import ArgumentParser
internal import QCOW2

/// `qcowfs amend`: changes what kind of image a file is.
struct Amend: Verb, ImageOptionReader {
    static let configuration = CommandConfiguration(
        commandName: "amend",
        abstract: "Change what kind of image a file is; what the guest reads stays.",
        discussion: """
            Options of -o: compat (0.10, 1.1, v2, v3), refcount_bits, lazy_refcounts, backing_file \
            and backing_fmt (stored and not looked at), data_file, data_file_raw=off, size.
            """)

    @Option(
        name: [.customShort("o"), .customLong("option")],
        help: ArgumentHelp("What shall change.", valueName: "OPT=VALUE,..."))
    var options: [String]

    @Option(name: .shortAndLong, help: "The format; only qcow2.", completion: .list(["qcow2"]))
    var format = "qcow2"

    @OptionGroup var policy: PolicyOptions
    @OptionGroup var progress: ProgressOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    func perform() throws -> Int32 {
        guard format == "qcow2" else {
            throw Failure(image, "format \(format) cannot be amended, only qcow2 can")
        }
        var wanted = AmendOptions()
        for (name, value) in options.flatMap(OptionList.pairs) {
            try set(name, to: value, in: &wanted)
        }
        try progress.run("amend", on: image, interrupted: "it is as it was") {
            [wanted] progress throws(ImageError) in
            try Image.amend(image, options: wanted, policy: policy.policy, progress: progress)
        }
        return 0
    }

    private func set(_ name: String, to value: String, in options: inout AmendOptions) throws {
        switch name {
        case "compat": options.version = try version(value, of: name)
        case "refcount_bits": options.refcountBits = try bytes(value, of: name)
        case "lazy_refcounts": options.hasLazyRefcounts = try isOn(value, of: name)
        case "backing_file": options.backingFile = value
        case "backing_fmt": options.backingFormat = value
        case "size": options.size = try bytes(value, of: name)
        case "data_file": options.dataFile = value
        case "data_file_raw": options.dataFileIsRaw = try isOn(value, of: name)
        case "cluster_size", "extended_l2", "compression_type", "preallocation":
            throw Failure(image, "\(name) cannot be changed; convert the image to another one")
        default:
            throw Failure(image, "there is no option '\(name)' (qcowfs help amend lists them)")
        }
    }
}
