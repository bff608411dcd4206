/// A run of guest bytes that one source answers.
package struct Extent: Equatable, Sendable {
    package var kind: ClusterKind
    /// Whether data lies in clusters that have no other reference, so that it may be written over.
    package var isCopied: Bool
    /// `.unallocated`: whether a host cluster is reserved all the same, whose bytes are not shown
    /// (extended L2 entries only).
    package var isReserved = false
    /// `.data`, `.zeroAllocated`, where it is reserved: the host offset of the first byte.
    /// `.compressed`, `.corrupt`: the L2 entry (for a bad L1 entry, that one).
    package var host: UInt64
    package var byteCount: UInt64

    @inline(__always)
    package init(_ kind: ClusterKind, isCopied: Bool = false, host: UInt64 = 0, byteCount: UInt64) {
        self.kind = kind
        self.isCopied = isCopied
        self.host = host
        self.byteCount = byteCount
    }

    /// Whether there are host clusters, of data or not.
    package var hasCluster: Bool { kind == .data || kind == .zeroAllocated || isReserved }
}
