public import Logging

/// How an image is opened; every part has a default.
public struct OpenOptions: Sendable {
    /// Whether an image is to be changed.
    public enum Access: Sendable {
        /// Nothing of the file is changed.
        case readOnly
        /// The top layer takes writes; the files below it are only read.
        case readWrite
    }

    /// What keeps other programs away.
    public enum Locking: Sendable {
        /// The byte locks QEMU honours are taken, or the open fails.
        case required
        /// Read-only although another program may write (`--force-share`).
        case forceShare
    }

    /// Whether an image is to be changed.
    public var access: Access
    /// Which other files the image may make us open.
    public var policy: OpenPolicy
    /// What keeps other programs away.
    public var locking: Locking
    /// Bytes of L2 tables kept in memory, all layers together.
    public var cacheByteCount: Int
    /// Bytes of decompressed clusters kept in memory, all layers together.
    public var decompressedCacheByteCount: Int
    /// O_DIRECT on the image's files.
    public var bypassesPageCache: Bool
    /// What opens the encrypted files of the chain.
    public var passphrases: PassphraseSource
    /// Where warnings go: what is odd and is no error.
    public var logger: Logger

    /// The defaults, as far as nothing else is said.
    public init(
        access: Access = .readWrite,
        policy: OpenPolicy = .imageDirectory,
        locking: Locking = .required,
        cacheByteCount: Int = 32 << 20,
        decompressedCacheByteCount: Int = 32 << 20,
        bypassesPageCache: Bool = false,
        passphrases: PassphraseSource = PassphraseSource(),
        logger: Logger = Logger(label: "qcow2", factory: { _ in SwiftLogNoOpLogHandler() })
    ) {
        self.access = access
        self.policy = policy
        self.locking = locking
        self.cacheByteCount = cacheByteCount
        self.decompressedCacheByteCount = decompressedCacheByteCount
        self.bypassesPageCache = bypassesPageCache
        self.passphrases = passphrases
        self.logger = logger
    }
}
