internal import ArgumentParser
internal import QCOW2

/// How a verb opens the disks that it only reads.
struct SourceOptions: ParsableArguments {
    @OptionGroup var policy: PolicyOptions

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Read an image that another program writes.")
    var isShared = false

    @OptionGroup var passphrases: PassphraseOptions

    func openOptions() throws(ImageError) -> OpenOptions {
        OpenOptions(
            access: .readOnly, policy: policy.policy,
            locking: isShared ? .forceShare : .required, passphrases: try passphrases.source())
    }

    func open(
        _ path: String, format: DiskFormat?, snapshot: String? = nil
    ) throws(ImageError) -> SourceDisk {
        try SourceDisk(
            path: path, format: format?.source, snapshot: snapshot,
            options: try openOptions())
    }
}

/// `raw` or `qcow2`, as `-f` and `-O` name them.
enum DiskFormat: String, ExpressibleByArgument, CaseIterable {
    case raw, qcow2

    var source: SourceDisk.Format { self == .raw ? .raw : .qcow2 }
}
