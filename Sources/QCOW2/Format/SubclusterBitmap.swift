/// The second word of an extended L2 entry: what each of the cluster's 32 subclusters is.
///
/// | bits  | meaning                                                                    |
/// |-------|----------------------------------------------------------------------------|
/// | 0–31  | subcluster 0…31 is allocated: its bytes are those of the host cluster      |
/// | 32–63 | subcluster 0…31 reads as zeros                                             |
///
/// With neither bit a subcluster shows the backing file, whether there is a host cluster or not.
/// A set of subclusters is a `UInt32`, the first subcluster in its lowest bit.
package struct SubclusterBitmap: Equatable, Sendable {
    /// Subclusters of a cluster.
    package static let count = 32
    /// `count` as a power of two.
    package static let countBits: UInt64 = 5

    package var bits: UInt64

    @inline(__always) package init(bits: UInt64) { self.bits = bits }

    @inline(__always) package init(allocated: UInt32, zero: UInt32) {
        bits = UInt64(zero) &<< 32 | UInt64(allocated)
    }

    /// Nothing is allocated, nothing is zero; what a compressed cluster has.
    package static let none = SubclusterBitmap(bits: 0)
    package static let allZero = SubclusterBitmap(allocated: 0, zero: .max)

    @inline(__always) package var allocated: UInt32 { UInt32(truncatingIfNeeded: bits) }
    @inline(__always) package var zero: UInt32 { UInt32(truncatingIfNeeded: bits &>> 32) }

    /// Whether a subcluster is allocated and zero at once, which makes no sense.
    @inline(__always) package var clashes: Bool { allocated & zero != 0 }

    /// The set of subclusters `range`, whose bounds are at most `count`.
    @inline(__always)
    package static func set(_ range: Range<Int>) -> UInt32 {
        UInt32(
            truncatingIfNeeded: (1 as UInt64) &<< UInt64(range.upperBound)
                &- (1 as UInt64) &<< UInt64(range.lowerBound))
    }

    /// The bitmap once the subclusters of `set` are data.
    @inline(__always)
    package func allocating(_ set: UInt32) -> SubclusterBitmap {
        SubclusterBitmap(allocated: allocated | set, zero: zero & ~set)
    }
}

extension L2Entry {
    /// Whether an entry that is not compressed has a host cluster: in an external data file even
    /// offset 0 is one, which COPIED tells from none.
    @inline(__always)
    package func hasCluster(inDataFile: Bool) -> Bool { offset != 0 || inDataFile && isCopied }

    /// What an extended entry means for one of its subclusters; one that contradicts itself
    /// anywhere is `.corrupt` everywhere.
    /// - Parameter clusterMask: the cluster size in bytes, less 1.
    @inline(__always)
    package func kind(
        ofSubcluster index: Int, hasCluster: Bool, clusterMask: UInt64
    ) -> ClusterKind {
        if isCompressed { return isCopied ? .corrupt : .compressed }
        if offset & clusterMask != 0 || subclusters.clashes
            || !hasCluster && subclusters.allocated != 0
        {
            return .corrupt
        }
        let bit = (1 as UInt32) &<< UInt32(truncatingIfNeeded: index)
        if subclusters.zero & bit != 0 { return hasCluster ? .zeroAllocated : .zeroPlain }
        return subclusters.allocated & bit != 0 ? .data : .unallocated
    }

    /// The end of the run of subclusters from `index` on, which is of this kind, that are like it.
    @inline(__always)
    package func endOfSubclusters(_ kind: ClusterKind, from index: Int) -> Int {
        let alike: UInt32 =
            switch kind {
            case .data: subclusters.allocated
            case .zeroPlain, .zeroAllocated: subclusters.zero
            default: ~(subclusters.allocated | subclusters.zero)
            }
        // What is shifted in is 0, so that the run ends with the cluster.
        return index &+ (~(alike &>> UInt32(truncatingIfNeeded: index))).trailingZeroBitCount
    }

    /// The extended entry once the subclusters of `set` are data in the cluster at `offset`, which
    /// has no other reference; what else was allocated is data there too.
    package func showing(_ set: UInt32, inClusterAt offset: UInt64) -> L2Entry {
        L2Entry(bits: offset | L2Entry.copied, subclusters: subclusters.allocating(set))
    }

    /// The extended entry once the subclusters of `set` read as zeros.  One that is compressed is
    /// zeroed whole.
    /// - Parameters:
    ///   - hasCluster: whether it has a host cluster of its own.
    ///   - keepsCluster: whether the host cluster stays although nothing is left in it.
    ///   - hidesBacking: whether subclusters that are unallocated may show anything.
    package func zeroing(
        _ set: UInt32, hasCluster: Bool, keepsCluster: Bool, hidesBacking: Bool
    ) -> L2Entry {
        if set == .max, keepsCluster, hasCluster {
            return L2Entry(bits: bits, subclusters: .allZero)
        }
        let isNothing = !isCompressed && !hasCluster && subclusters == .none
        if set == .max { return isNothing && !hidesBacking ? self : .zeroPlainExtended }
        let (allocated, zero) = (subclusters.allocated, subclusters.zero)
        // Without a cluster, what shows nothing is left alone.
        let shown: UInt32 = hidesBacking || hasCluster ? .max : 0
        let left = SubclusterBitmap(allocated: allocated & ~set, zero: zero | set & shown)
        // The last data is gone, and the cluster with it.
        let isFreed = !keepsCluster && allocated != 0 && left.allocated == 0
        return L2Entry(bits: isFreed ? 0 : bits, subclusters: left)
    }

    /// No host cluster, and all subclusters read as zeros.
    package static let zeroPlainExtended = L2Entry(bits: 0, subclusters: .allZero)
}
