/// What writing and zeroing need beyond clusters where L2 entries are extended.
extension Image {
    // MARK: Moving a cluster

    /// The bytes to write to new clusters for guest bytes `range`: whole clusters, or with extended
    /// entries whole subclusters, and next to them what is allocated in a cluster that moves.
    func rangeToWrite(
        _ range: Range<UInt64>, _ extent: Extent, _ writing: Writing
    ) throws(ImageError) -> Range<UInt64> {
        let clusterEnd = (range.upperBound &+ map.clusterMask) & ~map.clusterMask
        let clusters = (range.lowerBound & ~map.clusterMask)..<clusterEnd
        guard map.isExtended else { return clusters }
        if extent.kind == .compressed {
            try checkBitmapOfCompressed(at: range.lowerBound, writing)
            return clusters
        }
        let mask = map.subclusterMask
        var lower = range.lowerBound & ~mask
        var upper = (range.upperBound &+ mask) & ~mask
        guard extent.hasCluster else { return lower..<upper }
        let before = try allocatedSubclusters(ofClusterAt: lower)
        while lower > clusters.lowerBound, before.contains(lower &- 1) { lower &-= mask &+ 1 }
        let behind = try allocatedSubclusters(ofClusterAt: upper &- 1)
        while upper < clusters.upperBound, behind.contains(upper) { upper &+= mask &+ 1 }
        return lower..<upper
    }

    /// Which subclusters of a guest cluster are allocated.
    private struct Allocated {
        let set: UInt32
        let clusterMask: UInt64
        let subclusterBits: UInt64

        /// Whether the subcluster at `guest`, which is in the cluster, is one of them.
        func contains(_ guest: UInt64) -> Bool {
            let index = (guest & clusterMask) &>> subclusterBits
            return set &>> UInt32(truncatingIfNeeded: index) & 1 != 0
        }
    }

    private func allocatedSubclusters(
        ofClusterAt guest: UInt64
    ) throws(ImageError) -> Allocated {
        let entry = try map.entry(of: guest &>> map.clusterBits)
        return Allocated(
            set: entry.subclusters.allocated, clusterMask: map.clusterMask,
            subclusterBits: map.subclusterBits)
    }

    /// Copies what is allocated in the first and the last cluster of `range`, but outside of it,
    /// to where those clusters move: `host` is the first one's new place.
    func copyAllocated(
        outside range: Range<UInt64>, to host: UInt64, _ writing: Writing
    ) throws(ImageError) {
        let first = range.lowerBound &>> map.clusterBits
        let last = (range.upperBound &- 1) &>> map.clusterBits
        for cluster in first == last ? [first] : [first, last] {
            let allocated = try map.entry(of: cluster).subclusters.allocated
            var left = allocated & ~map.subclusters(of: range, inCluster: cluster)
            while left != 0 {
                let start = left.trailingZeroBitCount
                let count = (~(left &>> UInt32(start))).trailingZeroBitCount
                left &= ~SubclusterBitmap.set(start..<start + count)
                let offset = UInt64(start) &<< map.subclusterBits
                try copy(
                    cluster &<< map.clusterBits &+ offset, count: count << Int(map.subclusterBits),
                    to: host &+ (cluster &- first) &<< map.clusterBits &+ offset, writing)
            }
        }
    }

    /// Throws where a compressed cluster has a subcluster bitmap, which a reader overlooks.
    private func checkBitmapOfCompressed(
        at guest: UInt64, _ writing: Writing
    ) throws(ImageError) {
        let entry = try map.entry(of: guest &>> map.clusterBits)
        guard entry.isCompressed, entry.subclusters != .none else { return }
        let extent = Extent(.corrupt, host: entry.bits, byteCount: 0)
        throw stopWriting(top.fault(extent, at: guest), writing)
    }

    // MARK: Zeroing

    /// Zeroes guest bytes that begin and end with a subcluster, or end with the disk.
    func zeroSubclusters(
        _ range: Range<UInt64>, _ zeroing: Zeroing, _ writing: Writing
    ) throws(ImageError) {
        if range.isEmpty { return }
        let mask = map.clusterMask
        // The end of the disk counts as the end of its cluster.
        let end = range.upperBound == size ? (size &+ mask) & ~mask : range.upperBound
        var offset = range.lowerBound
        while offset < end {
            let clusterEnd = (offset | mask) &+ 1
            let isWhole = offset & mask == 0 && clusterEnd <= end
            let tableEnd = (offset &>> map.coverageBits &+ 1) &<< map.coverageBits
            let next = isWhole ? min(end & ~mask, tableEnd) : min(clusterEnd, end)
            try zeroSubclusters(offset..<next, isWhole: isWhole, zeroing, writing)
            offset = next
        }
    }

    /// Zeroes whole clusters, or a part of one.
    private func zeroSubclusters(
        _ range: Range<UInt64>, isWhole: Bool, _ zeroing: Zeroing, _ writing: Writing
    ) throws(ImageError) {
        let hidesBacking = range.lowerBound < backingEnd
        var changes = false
        // What lies in a data file, whose own bytes follow.
        var stored: [(Range<UInt64>, ClusterKind)] = []
        var offset = range.lowerBound
        while offset < range.upperBound {
            let extent = try extentToChange(
                at: offset, limit: range.upperBound &- offset, writing)
            switch extent.kind {
            case .compressed:
                try checkBitmapOfCompressed(at: offset, writing)
                // The stream has no part that could be zero.
                guard isWhole else { return try writeZeroBytes(range, writing) }
                changes = true
            case .zeroPlain, .corrupt: break
            case .unallocated: changes = changes || hidesBacking || extent.isReserved
            case .zeroAllocated: changes = changes || zeroing == .unmapping
            case .data: changes = true
            }
            if map.hasDataFile, extent.hasCluster {
                stored.append((offset..<offset &+ extent.byteCount, extent.kind))
            }
            offset &+= extent.byteCount
        }
        if header.hasRawDataFile {
            for (run, kind) in stored where kind == .data { try zeroRawDataFile(run, zeroing) }
            return
        }
        guard changes else { return }
        let first = range.lowerBound &>> map.clusterBits
        try change(range, writing) { index, old in
            old.zeroing(
                map.subclusters(of: range, inCluster: first &+ UInt64(index)),
                hasCluster: map.hasCluster(old), keepsCluster: zeroing == .keeping,
                hidesBacking: hidesBacking)
        }
        if zeroing == .unmapping { for (run, kind) in stored { unmapDataFile(run, kind) } }
    }

    // MARK: Allocating

    /// Gives a guest cluster (an index) space; what it reads stays.
    func reserveCluster(
        _ cluster: UInt64, _ takingSpace: Bool, _ writing: Writing
    ) throws(ImageError) {
        let old = try map.entry(of: cluster)
        if old.isCompressed { return }
        let start = cluster &<< map.clusterBits
        var subclusters = old.subclusters
        if try isHole(unallocated: subclusters, of: start) {
            // Zero with space, so that the space shows.
            subclusters = SubclusterBitmap(
                allocated: subclusters.allocated, zero: ~subclusters.allocated)
        }
        let hasCluster = map.hasCluster(old)
        if map.hasDataFile, hasCluster {
            try top.data.reserveKeepingBytes(start..<top.clusterEnd(at: start, diskEnd: size))
        }
        if hasCluster, subclusters == old.subclusters { return }
        try makeTableWritable(at: start, writing)
        let new =
            hasCluster
            ? nil : try allocateReserved(forGuest: cluster, takingSpace, writing)
        try link(cluster, count: 1, writing) { _, old in
            // The end of a snapshot may have marked the cluster COPIED meanwhile.
            let bits = new.map { $0.first &<< map.clusterBits | L2Entry.copied } ?? old.bits
            return L2Entry(bits: bits, subclusters: subclusters)
        }
    }

    /// Whether nothing shows through the unallocated subclusters of the cluster at `start`.
    private func isHole(
        unallocated subclusters: SubclusterBitmap, of start: UInt64
    ) throws(ImageError) -> Bool {
        if start >= backingEnd { return true }
        let told = subclusters.allocated | subclusters.zero
        for index in 0..<SubclusterBitmap.count where told &>> UInt32(index) & 1 == 0 {
            let offset = start &+ UInt64(index) &<< map.subclusterBits
            let end = min(offset &+ map.subclusterMask &+ 1, size)
            if offset < end, try !isHole(offset..<end) { return false }
        }
        return true
    }
}
