internal import Glibc
internal import QCOW2

/// The mounts there are.
public enum Mounts {
    /// One mount of an image or several.
    public struct Summary: Sendable, Equatable {
        /// The image's path; several are joined by colons.
        public var image: String
        public var mountpoint: String
        public var isReadOnly: Bool
        /// The daemon's process id; nil where it is dead or cannot be asked.
        public var processID: Int32?
        /// Seconds since 1970.
        public var since: Int?
        /// The daemon was killed: the mount is to be cleaned up with `umount`.
        public var isDead: Bool
    }

    /// The calling user's mounts, oldest first.
    public static func list() -> [Summary] {
        MountTable.entries().filter { $0.isOurs && $0.userID == geteuid() }.map(summary)
    }

    /// Counters of the mount at `mountpoint`, by name.
    public static func statistics(of mountpoint: String) throws(MountError) -> [String: UInt64] {
        let entry = try entry(at: mountpoint)
        guard let client = ControlClient(entry), let lines = client.ask("stats") else {
            throw MountError(mountpoint, "its daemon does not answer")
        }
        return lines.compactMapValues { UInt64($0) }
    }

    /// The mount of ours at a path as a person gives it.
    static func entry(at mountpoint: String) throws(MountError) -> MountEntry {
        let path: String
        do throws(SystemError) {
            path = try Paths.resolvedExceptLast(mountpoint)
        } catch {
            throw MountError(mountpoint, error)
        }
        guard let entry = MountTable.entry(at: path) ?? throughLink(mountpoint) else {
            throw MountError(mountpoint, "not mounted")
        }
        guard entry.isOurs else {
            throw MountError(mountpoint, "not a mount of qcowfs, but of type \(entry.type)")
        }
        return entry
    }

    /// The last component may be a link to a mountpoint; that of a dead mount cannot be followed.
    private static func throughLink(_ mountpoint: String) -> MountEntry? {
        guard let path = try? Paths.resolved(mountpoint) else { return nil }
        return MountTable.entry(at: path)
    }

    private static func summary(_ entry: MountEntry) -> Summary {
        var summary = Summary(
            image: entry.source, mountpoint: entry.mountpoint, isReadOnly: entry.isReadOnly,
            processID: nil, since: nil, isDead: false)
        guard let client = ControlClient(entry) else {
            summary.isDead = isDead(entry.mountpoint)
            return summary
        }
        summary.processID = client.process > 0 ? client.process : nil
        if let answer = client.ask("about") {
            if let bytes = answer["image"].flatMap({ ControlWords.decoded($0[...]) }) {
                summary.image = String(decoding: bytes, as: UTF8.self)
            }
            summary.since = answer["since"].flatMap { Int($0) }
        }
        return summary
    }

    /// Whether nobody serves a mount any more.
    static func isDead(_ mountpoint: String) -> Bool {
        // The kernel may still know the attributes of a dead mount, but not its space.
        var report = statvfs()
        return statvfs(mountpoint, &report) != 0 && (errno == ENOTCONN || errno == ECONNABORTED)
    }
}
