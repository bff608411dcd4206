internal import ArgumentParser
internal import ImageMount
internal import QCOW2

/// `qcowfs snapshot`: lists, makes, applies and deletes internal snapshots.
struct Snapshots: Verb {
    static let configuration = CommandConfiguration(
        commandName: "snapshot",
        abstract: "List, make, apply or delete the internal snapshots of an image.",
        discussion: """
            SNAPSHOT is an identifier or a name.  Without -c, -a or -d the snapshots are listed.  \
            On an image that is mounted its daemon does the work.
            """)

    @Flag(name: .shortAndLong, help: "List the snapshots.")
    var list = false

    @Option(
        name: .shortAndLong,
        help: ArgumentHelp("Keep the disk as it is now under this name.", valueName: "name"))
    var create: String?

    @Option(
        name: .shortAndLong,
        help: ArgumentHelp("Make the disk what it was then.", valueName: "snapshot"))
    var apply: String?

    @Option(
        name: .shortAndLong, help: ArgumentHelp("Delete a snapshot.", valueName: "snapshot"))
    var delete: String?

    @Flag(name: .shortAndLong, help: "Nothing is printed but the list; for habit's sake.")
    var quiet = false

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "List the snapshots of an image that another program writes.")
    var isShared = false

    @OptionGroup var output: OutputOptions

    // No backing file is opened and no guest data is decrypted; for habit's sake.
    @OptionGroup(visibility: .hidden) var passphrases: PassphraseOptions
    @OptionGroup(visibility: .hidden) var policy: PolicyOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    func validate() throws {
        let count = [list, create != nil, apply != nil, delete != nil].count { $0 }
        guard count <= 1 else {
            throw ValidationError("only one of -l, -c, -a and -d can be done at once")
        }
    }

    func perform() throws -> Int32 {
        if let create {
            try change { image throws(ImageError) in
                try image.createSnapshot(create)
            } throughDaemon: { holder throws(MountError) in
                try holder.createSnapshot(create)
            }
        } else if let apply {
            try change { image throws(ImageError) in
                try image.applySnapshot(apply)
            } throughDaemon: { holder throws(MountError) in
                try holder.applySnapshot(apply)
            }
        } else if let delete {
            try change { image throws(ImageError) in
                try image.deleteSnapshot(delete)
            } throughDaemon: { holder throws(MountError) in
                try holder.deleteSnapshot(delete)
            }
        } else {
            show(try snapshots())
        }
        return 0
    }

    private func change(
        _ body: (Image) throws(ImageError) -> Void,
        throughDaemon: (ImageHolder) throws(MountError) -> Void
    ) throws {
        try HeldImage.change(
            image,
            opening: { path throws(ImageError) in
                let image = try Image.openAlone(path)
                // It is done in a moment, and half of it would waste space.
                Interruption.watch()
                return image
            },
            body, throughDaemon: throughDaemon)
    }

    private func snapshots() throws -> [Snapshot] {
        do throws(ImageError) {
            return try ImageInfo(path: image, locking: isShared ? .forceShare : .required).snapshots
        } catch {
            guard case .locked = error.kind, let holder = ImageHolder.find(image) else {
                throw error
            }
            return try holder.snapshots()
        }
    }

    private func show(_ snapshots: [Snapshot]) {
        switch output.form {
        case .json: print(JSON.array(snapshots.map(InfoReport.json)).text)
        case .human:
            let lines = InfoReport.snapshotLines(snapshots)
            if !lines.isEmpty { print(lines.joined(separator: "\n")) }
        }
    }
}
