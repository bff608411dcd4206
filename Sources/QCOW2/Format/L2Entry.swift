/// One entry of an L2 table: the cluster descriptor, and in an extended (16-byte) entry what its
/// subclusters are.
///
/// | bit 62 = 0 | bits  | meaning                                                        |
/// |------------|-------|----------------------------------------------------------------|
/// |            | 0     | reads as zeros (version 3); no meaning in an extended entry    |
/// |            | 1–8   | reserved, 0                                                    |
/// |            | 9–55  | host offset of the cluster, aligned; 0: none                   |
/// |            | 56–61 | reserved, 0                                                    |
/// |            | 63    | COPIED: the cluster has exactly one reference                  |
/// | bit 62 = 1 |       | compressed, see `CompressedDescriptor`; COPIED is 0            |
package struct L2Entry: Equatable, Sendable {
    /// The cluster descriptor.
    package var bits: UInt64
    /// The second word of an extended entry, `.none` in a standard one.
    package var subclusters: SubclusterBitmap

    @inline(__always) package init(bits: UInt64, subclusters: SubclusterBitmap = .none) {
        self.bits = bits
        self.subclusters = subclusters
    }

    static let copied: UInt64 = 1 << 63
    static let compressed: UInt64 = 1 << 62
    static let zero: UInt64 = 1
    static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00

    package static let unallocated = L2Entry(bits: 0)
    package static let zeroPlain = L2Entry(bits: zero)

    /// A data cluster at `offset` that has exactly one reference.
    @inline(__always) package init(copiedClusterAt offset: UInt64) {
        self.init(bits: offset | L2Entry.copied)
    }

    @inline(__always) package var offset: UInt64 { bits & L2Entry.offsetMask }
    @inline(__always) package var isCopied: Bool { bits & L2Entry.copied != 0 }
    @inline(__always) package var isCompressed: Bool { bits & L2Entry.compressed != 0 }
    @inline(__always) package var hasZeroFlag: Bool { bits & L2Entry.zero != 0 }
    /// Whether bytes of a host cluster may show; COPIED alone is the first cluster of a data file.
    @inline(__always) package var showsData: Bool {
        isCompressed || !hasZeroFlag && bits & (L2Entry.offsetMask | L2Entry.copied) != 0
    }
    /// What must be 0 and is not.  Nobody knows what it says, so such an entry is read and not
    /// changed.
    package var reservedBits: UInt64 { isCompressed ? 0 : bits & L2Entry.reservedMask }
    private static var reservedMask: UInt64 { ~(offsetMask | copied | compressed | zero) }
    /// Whether the cluster is ours alone, and nothing unknown is said of it.
    @inline(__always) package var isCopiedAndKnown: Bool {
        bits & (L2Entry.copied | L2Entry.reservedMask) == L2Entry.copied
    }

    /// The same entry in a table that is, or may be, shared.
    @inline(__always) package var withoutCopied: L2Entry { withCopied(false) }
    @inline(__always) package func withCopied(_ isCopied: Bool) -> L2Entry {
        L2Entry(
            bits: isCopied ? bits | L2Entry.copied : bits & ~L2Entry.copied,
            subclusters: subclusters)
    }
    @inline(__always) package var withZeroFlag: L2Entry { L2Entry(bits: bits | L2Entry.zero) }
}

/// Where a compressed cluster's stream lies (specification, "Compressed Clusters Descriptor").
///
/// With x = 62 − (cluster_bits − 8): bits 0…x−1 are the host offset in bytes, bits x…61 the number
/// of 512-byte sectors beyond the one with the first byte.  The stream may be shorter.
package struct CompressedDescriptor: Equatable, Sendable {
    /// Host offset of the first byte, of any alignment.
    package var offset: UInt64
    /// Bytes up to the end of the last sector: an upper bound of the stream's length.
    package var byteCount: Int

    /// `clusterBits` is 9…21, so the offset has 61…49 bits and the count at most 13.
    @inline(__always)
    package init(_ entry: L2Entry, clusterBits: UInt32) {
        let offsetBits = UInt64(70 &- clusterBits)
        let descriptor = entry.bits & (L2Entry.compressed &- 1)
        offset = descriptor & (1 &<< offsetBits &- 1)
        let sectorCount = Int(truncatingIfNeeded: descriptor &>> offsetBits)
        byteCount = (sectorCount &+ 1) &* 512 &- Int(truncatingIfNeeded: offset & 511)
    }

    /// The host clusters that carry a reference for this stream.
    package func hostClusters(clusterBits: UInt32) -> ClosedRange<UInt64> {
        let last = offset &+ UInt64(byteCount) &- 1  // offset has at most 61 bits
        return offset &>> UInt64(clusterBits)...last &>> UInt64(clusterBits)
    }
}

/// What an L2 entry says of its cluster.
package enum ClusterKind: UInt8, Sendable {
    /// No cluster: the backing file shows through.
    case unallocated
    /// Reads as zeros and has no host cluster.
    case zeroPlain
    /// Reads as zeros and owns a host cluster.
    case zeroAllocated
    /// The bytes of a host cluster.
    case data
    case compressed
    /// The entry cannot be obeyed: EIO.
    case corrupt
}

extension L2Entry {
    /// What a standard entry means; a bad one is `.corrupt`.
    /// - Parameter clusterMask: the cluster size in bytes, less 1.
    @inline(__always)
    package func kind(clusterMask: UInt64, version: UInt32) -> ClusterKind {
        if isCompressed { return isCopied ? .corrupt : .compressed }
        if offset & clusterMask != 0 { return .corrupt }
        if hasZeroFlag {
            if version < 3 { return .corrupt }
            return offset == 0 ? .zeroPlain : .zeroAllocated
        }
        return offset == 0 ? .unallocated : .data
    }

    /// What the entry of the guest cluster at `guest` means where guest data lies in an external
    /// data file: every cluster has there the place that it has on the disk, so that even host
    /// offset 0 is one, which COPIED tells from none.
    package func kindWithDataFile(at guest: UInt64) -> ClusterKind {
        if isCompressed { return .corrupt }
        if offset == 0, hasZeroFlag { return .zeroPlain }
        if offset == 0, !isCopied { return .unallocated }
        guard offset == guest else { return .corrupt }
        return hasZeroFlag ? .zeroAllocated : .data
    }

    /// Why `kindWithDataFile` is `.corrupt`.
    package var faultWithDataFile: String {
        let entry = "L2 entry \(hex(bits))"
        if isCompressed { return "\(entry) is compressed, which an external data file excludes" }
        return "\(entry) points to another place of the external data file than its own"
    }

    /// Why `kind` is `.corrupt`.
    package func fault(clusterByteCount: UInt64, version: UInt32, isExtended: Bool) -> String {
        let entry = "L2 entry \(hex(bits))"
        if isCompressed, isCopied { return "\(entry) is compressed and marked COPIED" }
        if isCompressed { return "\(entry) is compressed and has a subcluster bitmap" }
        if offset & (clusterByteCount &- 1) != 0 {
            return "\(entry) points inside a cluster (clusters are \(clusterByteCount) bytes)"
        }
        if isExtended {
            return offset == 0
                ? "\(entry) has allocated subclusters and no host cluster"
                : "\(entry) has a subcluster that is allocated and zero at once"
        }
        return "\(entry) has the zero flag, which version \(version) does not know"
    }
}
