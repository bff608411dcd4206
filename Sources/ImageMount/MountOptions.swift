public import Logging
public import QCOW2

/// What a person may choose about a mount; every part has a default.
public struct MountOptions: Sendable {
    /// Who besides the mounting user may use the files.
    public enum Visibility: Sendable { case owner, everybody, ownerAndRoot }

    /// Where writes go instead of into the image.
    public enum Overlay: Sendable, Equatable {
        /// A new qcow2 file at this path, which stays.
        case file(String)
        /// A new file that is gone when the mount ends.
        case temporary
    }

    public var isReadOnly = false
    /// What the exposed file is called, instead of the image's name.
    public var name: String?
    public var visibility = Visibility.owner
    /// The files' owner, group and missing permission bits, instead of the mounting user's and
    /// 0600.
    public var owner: UInt32?
    public var group: UInt32?
    public var umask: UInt32?
    public var overlay: Overlay?
    /// Whether internal snapshots appear beside their disks.
    public var showsSnapshots = false
    /// How writes, discards and size changes are taken.
    public var rules = FileRules()
    /// Bytes of L2 tables kept in memory, all images together.
    public var cacheByteCount = 32 << 20
    public var commitInterval = Duration.seconds(5)
    /// Worker threads; 2 or more.
    public var threadCount: Int?
    /// O_DIRECT on the images' files.
    public var bypassesPageCache = false
    /// Whether the kernel keeps written pages for a while before it hands them over.
    public var writesBack = false
    public var policy = OpenPolicy.imageDirectory
    /// What opens encrypted images.
    public var passphrases = PassphraseSource()
    /// Read-only although another program writes.
    public var forcesShare = false
    public var staysInForeground = false
    /// A file that holds the daemon's process id while it runs.
    public var pidFile: String?
    public var logger: Logger

    public init(logger: Logger) { self.logger = logger }
}

/// How the exposed file takes writes, discards and size changes.
public struct FileRules: Sendable, Equatable {
    /// What becomes of a range that a client punches or discards.
    public enum Discard: String, Sendable, CaseIterable { case unmap, ignore }

    /// What becomes of a write of nothing but zeros.
    public enum ZeroDetection: String, Sendable, CaseIterable { case off, on, unmap }

    public var discard = Discard.unmap
    public var zeroDetection = ZeroDetection.off
    /// Whether `truncate` to less makes the image smaller.
    public var allowsShrinking = false

    public init() {}
}
