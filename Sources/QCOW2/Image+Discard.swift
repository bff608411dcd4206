/// Ranges that shall read as zeros, with their clusters given back or kept.
extension Image {
    /// How a range becomes zero.
    enum Zeroing {
        /// Clusters are given back where the format can say so.
        case unmapping
        /// Clusters that are allocated stay so.
        case keeping
    }

    /// Makes `range` read as zeros and gives its clusters back: every whole cluster inside is a
    /// hole afterwards (the one at the end of the disk counts as whole), the rest is written.
    ///
    /// In a version 2 image a range that a backing file reaches is written with zeros instead:
    /// that format cannot hide the backing file otherwise.
    /// - Throws: What `write` throws.
    public func discard(_ range: Range<UInt64>) throws(ImageError) { try zero(range, .unmapping) }

    /// Makes `range` read as zeros.
    /// - Parameters:
    ///   - range: Bytes of the disk.
    ///   - keepingSpace: whether clusters that are allocated stay allocated.
    /// - Throws: What `write` throws.
    public func writeZeroes(_ range: Range<UInt64>, keepingSpace: Bool = false) throws(ImageError) {
        try zero(range, keepingSpace ? .keeping : .unmapping)
    }

    private func zero(_ range: Range<UInt64>, _ zeroing: Zeroing) throws(ImageError) {
        let writing = try writer()
        try checkRange(range.lowerBound, range.upperBound &- range.lowerBound)
        try begin(writing)
        writing.bitmaps.tracker.record(
            range.lowerBound, range.upperBound &- range.lowerBound)
        var offset = range.lowerBound
        while offset < range.upperBound {
            if let end = try endOfNothing(at: offset, range.upperBound) {
                offset = end
                continue
            }
            let end = min(ranges.groupEnd(of: offset), range.upperBound)
            try writing.commit.relieve()
            try zeroGroup(offset..<end, zeroing, writing)
            offset = end
        }
    }

    /// The end of the run from `offset` on in which there is nothing to give back and nothing to
    /// hide; nil where there is.
    private func endOfNothing(at offset: UInt64, _ limit: UInt64) throws(ImageError) -> UInt64? {
        let held = ranges.lockShared(offset, 1)
        defer { ranges.unlock(held) }
        let extent = try map.extent(at: offset, limit: limit &- offset)
        switch extent.kind {
        case .zeroPlain: return offset &+ extent.byteCount
        case .unallocated where offset >= backingEnd && !extent.isReserved:
            return offset &+ extent.byteCount
        default: return nil
        }
    }

    /// Zeroes a range inside of one group.
    private func zeroGroup(
        _ range: Range<UInt64>, _ zeroing: Zeroing, _ writing: Writing
    ) throws(ImageError) {
        let held = ranges.lockExclusive(range.lowerBound, range.upperBound &- range.lowerBound)
        defer { ranges.unlock(held) }
        let mask = map.subclusterMask
        let first = min((range.lowerBound &+ mask) & ~mask, range.upperBound)
        // The end of the disk counts as the end of its cluster.
        let last =
            range.upperBound == size ? range.upperBound : max(range.upperBound & ~mask, first)
        try zeroPart(range.lowerBound..<first, writing)
        try zeroClusters(first..<last, zeroing, writing)
        try zeroPart(last..<range.upperBound, writing)
    }

    /// Writes zeros to less than a subcluster, unless it reads as zeros already.
    private func zeroPart(_ range: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        guard !range.isEmpty, try !isHole(range) else { return }
        try writeZeroBytes(range, writing)
    }

    /// Zeroes whole clusters, with extended entries whole subclusters.
    func zeroClusters(
        _ range: Range<UInt64>, _ zeroing: Zeroing, _ writing: Writing
    ) throws(ImageError) {
        if map.isExtended { return try zeroSubclusters(range, zeroing, writing) }
        var offset = range.lowerBound
        while offset < range.upperBound {
            let extent = try extentToChange(
                at: offset, limit: range.upperBound &- offset, writing)
            let tableEnd = (offset &>> map.coverageBits &+ 1) &<< map.coverageBits
            let run = offset..<min(offset &+ extent.byteCount, tableEnd)
            try zeroRun(run, extent.kind, zeroing, writing)
            offset = run.upperBound
        }
    }

    /// Zeroes whole clusters of one kind, in the tables and, where it must or can be, in a data
    /// file.
    private func zeroRun(
        _ run: Range<UInt64>, _ kind: ClusterKind, _ zeroing: Zeroing, _ writing: Writing
    ) throws(ImageError) {
        if kind == .data, header.hasRawDataFile { return try zeroRawDataFile(run, zeroing) }
        try zeroEntries(run, kind, zeroing, writing)
        if map.hasDataFile, zeroing == .unmapping { unmapDataFile(run, kind) }
    }

    /// The table of what becomes of what.
    private func zeroEntries(
        _ run: Range<UInt64>, _ kind: ClusterKind, _ zeroing: Zeroing, _ writing: Writing
    ) throws(ImageError) {
        let hidesBacking = run.lowerBound < backingEnd
        switch (kind, zeroing) {
        case (.zeroPlain, _), (.zeroAllocated, .keeping), (.corrupt, _): return
        case (.unallocated, _) where !hidesBacking: return
        case (_, _)
        where map.version == 2 && (hidesBacking || zeroing == .keeping && kind == .data):
            if try !isHole(run) { try writeZeroBytes(run, writing) }
        case (.data, .keeping):
            try change(run, writing) { _, old in old.withZeroFlag }
        default:
            let empty = map.version == 2 ? L2Entry.unallocated : .zeroPlain
            try change(run, writing) { _, _ in empty }
        }
    }

    func change(
        _ run: Range<UInt64>, _ writing: Writing, _ change: (Int, L2Entry) -> L2Entry
    ) throws(ImageError) {
        try makeTableWritable(at: run.lowerBound, writing)
        let first = run.lowerBound &>> map.clusterBits
        let count = (run.upperBound &- 1) &>> map.clusterBits &- first &+ 1
        try link(first, count: Int(count), writing, change)
    }

    func writeZeroBytes(_ range: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = min(range.upperBound &- offset, UInt64(ZeroArea.byteCount))
            try writeLocked(
                UnsafeRawBufferPointer(start: zeroes, count: Int(count)), at: offset, writing)
            offset &+= count
        }
    }

    // MARK: Allocating

    /// Allocates every cluster of `range` that has none; what it reads stays.
    ///
    /// Clusters that read as zeros get space without being written (version 3); what shows through
    /// from a backing file is copied.
    /// - Parameters:
    ///   - range: Bytes of the disk.
    ///   - takingSpace: whether the file system reserves space for them.
    /// - Throws: What `write` throws.
    public func allocate(
        _ range: Range<UInt64>, takingSpace: Bool = true
    ) throws(ImageError) {
        let writing = try writer()
        try checkRange(range.lowerBound, range.upperBound &- range.lowerBound)
        try begin(writing)
        var offset = range.lowerBound & ~map.clusterMask
        while offset < range.upperBound {
            let end = min(ranges.groupEnd(of: offset), range.upperBound)
            try writing.commit.relieve()
            try allocateGroup(offset..<end, takingSpace, writing)
            offset = end
        }
    }

    private func allocateGroup(
        _ range: Range<UInt64>, _ takingSpace: Bool, _ writing: Writing
    ) throws(ImageError) {
        let held = ranges.lockExclusive(range.lowerBound, range.upperBound &- range.lowerBound)
        defer { ranges.unlock(held) }
        var offset = range.lowerBound
        while offset < range.upperBound {
            let cluster = offset..<min(offset &+ map.clusterMask &+ 1, size)
            let extent = try extentToChange(
                at: offset, limit: cluster.upperBound &- offset, writing)
            if map.isExtended {
                try reserveCluster(offset &>> map.clusterBits, takingSpace, writing)
            } else if extent.kind == .unallocated || extent.kind == .zeroPlain {
                try allocateCluster(cluster, takingSpace, writing)
            } else if map.hasDataFile {
                try top.data.reserveKeepingBytes(cluster)
            }
            offset &+= map.clusterMask &+ 1
        }
    }

    private func allocateCluster(
        _ cluster: Range<UInt64>, _ takingSpace: Bool, _ writing: Writing
    ) throws(ImageError) {
        guard map.version == 3, try isHole(cluster) else { return try copyUp(cluster, writing) }
        try makeTableWritable(at: cluster.lowerBound, writing)
        let run = try allocateReserved(
            forGuest: cluster.lowerBound &>> map.clusterBits, takingSpace, writing)
        let new = L2Entry(copiedClusterAt: run.first &<< map.clusterBits).withZeroFlag
        try link(cluster.lowerBound &>> map.clusterBits, count: 1, writing) { _, _ in new }
    }

    /// A new cluster inside of the file, for guest cluster `first`.
    func allocateReserved(
        forGuest first: UInt64, _ takingSpace: Bool, _ writing: Writing
    ) throws(ImageError) -> ClusterRun {
        let run = try allocate(forGuest: first, 1, writing)
        let host = run.first &<< map.clusterBits
        do throws(ImageError) {
            let end = top.clusterEnd(at: host, diskEnd: size)
            if takingSpace {
                try top.reserve(host..<end)
            } else if end > top.data.writtenEnd {
                try top.data.write([0], at: end &- 1)
            }
        } catch {
            try release(run, writing)
            throw error
        }
        return run
    }

    /// Writes a cluster with what it reads.
    private func copyUp(_ cluster: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        let count = Int(cluster.upperBound &- cluster.lowerBound)
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: 4096)
        defer { buffer.deallocate() }
        try readLocked(into: buffer, at: cluster.lowerBound)
        try writeLocked(UnsafeRawBufferPointer(buffer), at: cluster.lowerBound, writing)
    }
}
