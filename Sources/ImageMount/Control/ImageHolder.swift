internal import Glibc
public import QCOW2

/// A daemon of this user that has an image open: changes of the image go through it.
public struct ImageHolder: Sendable {
    /// The daemon's process id.
    public let processID: Int32
    private let entry: MountEntry
    /// Which file the image is.
    private let identity: String

    /// The daemon that has the image at `path` open, nil where there is none that answers us.
    public static func find(_ path: String) -> ImageHolder? {
        var status = stat()
        guard stat(path, &status) == 0 else { return nil }
        let identity = FileIdentity(status).word
        let user = geteuid()
        for entry in MountTable.entries() where entry.isOurs {
            guard user == 0 || entry.userID == user, let client = ControlClient(entry) else {
                continue
            }
            let answer = client.ask(ControlWords.line(["holds", identity]))
            if answer?["holds"] == "yes" {
                return ImageHolder(processID: client.process, entry: entry, identity: identity)
            }
        }
        return nil
    }

    public func snapshots() throws(MountError) -> [Snapshot] {
        let answer = try ask("snapshots", [])
        let count = answer["count"].flatMap { Int($0) } ?? 0
        return (0..<count).compactMap { answer["snapshot.\($0)"].flatMap(SnapshotLine.snapshot) }
    }

    public func createSnapshot(_ name: String) throws(MountError) {
        _ = try ask("snapshot-create", [name])
    }

    /// - Parameter word: an identifier or a name.
    public func applySnapshot(_ word: String) throws(MountError) {
        _ = try ask("snapshot-apply", [word])
    }

    /// - Parameter word: a name or an identifier.
    public func deleteSnapshot(_ word: String) throws(MountError) {
        _ = try ask("snapshot-delete", [word])
    }

    public func resize(
        _ change: SizeChange, shrinking: Bool, preallocation: CreateOptions.Preallocation
    ) throws(MountError) {
        _ = try ask(
            "resize", [change.description, shrinking ? "shrink" : "keep", preallocation.rawValue])
    }

    private func ask(
        _ verb: String, _ words: [String]
    ) throws(MountError) -> [String: String] {
        guard let client = ControlClient(entry),
            let answer = client.wait(for: ControlWords.line([verb, identity] + words))
        else {
            throw MountError(entry.mountpoint, "its daemon (process \(processID)) does not answer")
        }
        if let error = answer["error"].flatMap({ ControlWords.decoded($0[...]) }) {
            throw MountError("", String(decoding: error, as: UTF8.self))
        }
        return answer
    }
}

extension FileIdentity {
    /// One word for the control socket.
    var word: String { "\(device):\(inode)" }
}
