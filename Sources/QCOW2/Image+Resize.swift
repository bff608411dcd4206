internal import Synchronization

/// Changing the size of the disk.
extension Image {
    /// Sets the size of the disk; new bytes read as zeros.
    /// - Parameters:
    ///   - byteCount: a multiple of 512.
    ///   - shrinking: whether it may become smaller: what lies behind is lost.
    /// - Throws: `.invalidArgument` for a size that cannot be.
    public func resize(to byteCount: UInt64, shrinking: Bool = false) throws(ImageError) {
        let writing = try writer()
        guard byteCount % 512 == 0 else {
            throw refusal("a disk's size is a multiple of 512, \(byteCount) is not")
        }
        guard byteCount <= Limits.virtualByteCount,
            header.l1EntryCountNeeded(for: byteCount) &* 8 <= Limits.l1ByteCount
        else {
            throw refusal(
                "\(byteCount) bytes are too many for clusters of \(clusterByteCount) bytes"
            )
        }
        if header.version == 2, header.snapshotCount > 0, byteCount != size {
            throw refusal("a version 2 image with snapshots cannot change its size")
        }
        try begin(writing)
        try writing.structure.withLock { _ throws(ImageError) in
            if byteCount > size { try grow(to: byteCount, writing) }
            if byteCount < size {
                guard shrinking else {
                    throw refusal("the disk would shrink and lose what lies behind \(byteCount)")
                }
                try shrink(to: byteCount, writing)
            }
        }
    }

    private func refusal(_ words: String) -> ImageError {
        ImageError(.invalidArgument(words), file: top.file.name)
    }

    /// New bytes read as zeros before the size says that they are there.
    private func grow(to new: UInt64, _ writing: Writing) throws(ImageError) {
        let old = size
        try makeL1Table(for: new, writing)
        try growDataFile(from: old, to: new)
        var offset = old
        while offset < new {
            let end = min(ranges.groupEnd(of: offset), new)
            if let free = try endOfUnused(at: offset, new) {
                offset = free
                continue
            }
            try writing.commit.relieve()
            try clearGroup(offset..<end, writing)
            offset = end
        }
        try mapRawDataFile(old..<new, writing)
        try writing.commit.now()
        writing.header.change { $0.storeBigEndian(new, at: HeaderField.size) }
        try writing.commit.now()
        currentSize.store(new, ordering: .releasing)
    }

    /// Moves the L1 table where there is room for the entries that `byteCount` bytes need.
    private func makeL1Table(for byteCount: UInt64, _ writing: Writing) throws(ImageError) {
        let needed = header.l1EntryCountNeeded(for: byteCount)
        guard needed > UInt64(map.l1EntryCount) else { return }
        let clusters = (needed &* 8 &+ map.clusterMask) &>> map.clusterBits
        let run = try allocate(Int(clusters), exactly: true, writing)
        for cluster in run.first..<run.end { writing.guarded.addTable(cluster) }
        ranges.lockEverything()
        defer { ranges.unlockEverything() }
        map.moveL1Table(to: run.first &<< map.clusterBits, count: Int(needed))
    }

    /// The end of the run from `offset` on that nothing has to be done about.
    private func endOfUnused(at offset: UInt64, _ limit: UInt64) throws(ImageError) -> UInt64? {
        guard offset & map.clusterMask == 0 else { return nil }
        let held = ranges.lockShared(offset, 1)
        defer { ranges.unlock(held) }
        let extent = try map.extent(at: offset, limit: limit &- offset)
        let isUnused =
            extent.kind == .zeroPlain || extent.kind == .unallocated && offset >= backingEnd
        return isUnused ? offset &+ extent.byteCount : nil
    }

    /// Makes a part of the new area read as zeros, whatever an old entry or the backing file has.
    private func clearGroup(_ range: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        let clusterEnd = (range.upperBound &+ map.clusterMask) & ~map.clusterMask
        let held = ranges.lockExclusive(range.lowerBound, clusterEnd &- range.lowerBound)
        defer { ranges.unlock(held) }
        let first = (range.lowerBound &+ map.clusterMask) & ~map.clusterMask
        if range.lowerBound < first {
            let tail = range.lowerBound..<first
            if try !isHole(tail) { try writeZeroBytes(tail, writing) }
        }
        if first < clusterEnd { try zeroClusters(first..<clusterEnd, .unmapping, writing) }
    }

    /// The size falls first, then the references behind it go, then the file is cut.
    private func shrink(to new: UInt64, _ writing: Writing) throws(ImageError) {
        ranges.lockEverything()
        defer { ranges.unlockEverything() }
        let old = size
        writing.header.change { $0.storeBigEndian(new, at: HeaderField.size) }
        try writing.commit.now()
        currentSize.store(new, ordering: .releasing)
        try dropClusters((new &+ map.clusterMask) & ~map.clusterMask..<max(old, new), writing)
        try dropTables(from: header.l1EntryCountNeeded(for: new), writing)
        try writing.commit.now()
        try writing.commit.cutFile()
        try cutDataFile(to: new)
    }

    /// Drops the clusters of `range` that lie in a table that stays.
    private func dropClusters(_ range: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        let tableEnd = header.l1EntryCountNeeded(for: size) &<< map.coverageBits
        var offset = range.lowerBound
        while offset < min(range.upperBound, tableEnd) {
            let extent = try map.extent(
                at: offset, limit: min(range.upperBound, tableEnd) &- offset)
            if extent.kind != .unallocated {
                try change(offset..<offset &+ extent.byteCount, writing) { _, _ in .unallocated }
            }
            offset &+= extent.byteCount
        }
    }

    /// Drops whole tables with everything in them.
    private func dropTables(from first: UInt64, _ writing: Writing) throws(ImageError) {
        var dropped: [ClusterRun] = []
        for index in Int(first)..<max(Int(first), map.l1EntryCount) {
            let entry = map.l1Entry(index)
            guard entry.offset != 0, entry.offset & map.clusterMask == 0 else { continue }
            try map.forEachEntry(ofTable: index) { entry in
                if !map.hasDataFile {
                    dropped.append(references: entry, clusterBits: map.clusterBits)
                }
                allocation.note(entry, .zeroPlain, shown: 0, clusterByteCount: clusterByteCount)
            }
            dropped.append(joining: ClusterRun(first: entry.offset &>> map.clusterBits, count: 1))
        }
        map.removeTables(from: Int(first), dropping: dropped)
    }
}
