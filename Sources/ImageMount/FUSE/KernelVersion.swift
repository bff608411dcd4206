internal import Synchronization

/// What the kernel at the other end of the session can be relied upon for.
struct KernelVersion: ~Copyable, Sendable {
    /// The minor number of the protocol it speaks; 0 before it has said so.
    private let minor = Atomic<UInt32>(0)

    func learn(minor: UInt32) { self.minor.store(minor, ordering: .relaxed) }

    /// Whether writes past the page cache throw away what cached readers hold, before and after:
    /// since Linux 6.14.  Older kernels leave stale pages: there O_DIRECT goes through the cache.
    var keepsDirectWritersCoherent: Bool { minor.load(ordering: .relaxed) >= 42 }
}
