internal import Synchronization

/// Changing the size of the disk.
extension Image {
    /// Sets the size of the disk; new bytes read as zeros.
    ///
    /// Where it cannot grow, for lack of space say, it is as long as before, as far as the device
    /// takes what has to be written for that.
    /// - Parameters:
    ///   - byteCount: a multiple of 512.
    ///   - shrinking: whether it may become smaller: what lies behind is lost.
    ///   - preallocation: what is allocated of the new bytes.
    /// - Throws: `.invalidArgument` for a size that cannot be, what `write` throws.
    public func resize(
        to byteCount: UInt64, shrinking: Bool = false,
        preallocation: CreateOptions.Preallocation = .off
    ) throws(ImageError) {
        let writing = try writer()
        if byteCount == size { return }
        try checkSize(byteCount)
        // Asked before anything is written, and again when the size can change no more.
        try checkDirection(to: byteCount, shrinking, preallocation)
        try begin(writing)
        try checkBitmaps(forSize: byteCount, writing)
        try writing.structure.withLock { _ throws(ImageError) in
            try checkDirection(to: byteCount, shrinking, preallocation)
            if header.version == 2, byteCount != size, try !snapshots().isEmpty {
                throw refusal("a version 2 image with snapshots cannot change its size")
            }
            if byteCount > size {
                try grow(to: byteCount, preallocation, writing)
            } else if byteCount < size {
                try shrink(from: size, to: byteCount, writing)
                countAllocationAgain()
            }
        }
    }

    private func checkDirection(
        to byteCount: UInt64, _ shrinking: Bool, _ preallocation: CreateOptions.Preallocation
    ) throws(ImageError) {
        guard byteCount < size else { return }
        guard shrinking else {
            throw refusal(
                "the disk would become smaller and lose what lies behind \(byteCount) bytes: "
                    + "resize --shrink does that")
        }
        guard preallocation == .off else {
            throw refusal("a disk that shrinks has nothing to preallocate")
        }
    }

    private func checkSize(_ byteCount: UInt64) throws(ImageError) {
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
    }

    /// Throws where a bitmap could not describe a disk of another size.
    func checkBitmaps(
        forSize byteCount: UInt64, _ writing: Writing
    ) throws(ImageError) {
        guard byteCount != size,
            let reason = writing.bitmaps.refusal(
                ofSize: byteCount, clusterBits: header.clusterBits)
        else { return }
        throw refusal(reason)
    }

    /// Gives new bytes their clusters: only in the tables, with space, or with zeros written.
    private func preallocate(
        _ range: Range<UInt64>, _ preallocation: CreateOptions.Preallocation
    ) throws(ImageError) {
        switch preallocation {
        case .off: return
        case .metadata: try allocate(range, takingSpace: false)
        case .falloc: try allocate(range)
        case .full:
            var offset = range.lowerBound
            while offset < range.upperBound {
                let count = min(range.upperBound &- offset, UInt64(ZeroArea.byteCount))
                try write(
                    UnsafeRawBufferPointer(start: zeroes, count: Int(count)), at: offset)
                offset &+= count
            }
        }
        try flush()
    }

    private func refusal(_ words: String) -> ImageError {
        ImageError(.invalidArgument(words), file: top.file.name)
    }

    /// Grows, or leaves the disk as long as it was.
    private func grow(
        to new: UInt64, _ preallocation: CreateOptions.Preallocation, _ writing: Writing
    ) throws(ImageError) {
        let old = size
        do throws(ImageError) {
            try grow(to: new, writing)
            try preallocate(old..<new, preallocation)
        } catch {
            // What went wrong first is what matters.
            try? takeBack(old..<new, writing)
            throw error
        }
    }

    /// Makes the disk end where `range` begins, which was to become its end.
    private func takeBack(_ range: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        try giveBackSpace(of: range)
        try shrink(from: range.upperBound, to: range.lowerBound, writing)
        countAllocationAgain()
    }

    /// Gives back the space of new clusters, which read as zeros without it too: a device that is
    /// full has none for the tables that are written next.
    private func giveBackSpace(of range: Range<UInt64>) throws(ImageError) {
        var offset = (range.lowerBound &+ map.clusterMask) & ~map.clusterMask
        while offset < min(range.upperBound, size) {
            var extent = try map.extent(at: offset, limit: size &- offset)
            if extent.hasCluster {
                // Clusters of zeros that follow one another may lie anywhere.
                let clusterEnd = (offset | map.clusterMask) &+ 1
                extent = try map.extent(at: offset, limit: min(clusterEnd, size) &- offset)
                // Zeros of the file are no zeros of an encrypted disk.
                if extent.kind != .data || !top.isEncrypted {
                    top.data.punchHole(extent.host..<extent.host &+ extent.byteCount)
                }
            }
            offset &+= extent.byteCount
        }
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
        try storeSize(new, writing)
        writing.bitmaps.recordSize(from: old, to: new)
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
        do throws(ImageError) {
            try map.moveL1Table(to: run.first &<< map.clusterBits, count: Int(needed))
        } catch {
            try writing.allocator.release(run)
            throw error
        }
    }

    /// The end of the run from `offset` on that nothing has to be done about.
    private func endOfUnused(at offset: UInt64, _ limit: UInt64) throws(ImageError) -> UInt64? {
        guard offset & map.clusterMask == 0 else { return nil }
        let held = ranges.lockShared(offset, 1)
        defer { ranges.unlock(held) }
        let extent = try map.extent(at: offset, limit: limit &- offset)
        let isUnused =
            extent.kind == .zeroPlain
            || extent.kind == .unallocated && offset >= backingEnd && !extent.isReserved
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
    /// - Parameter old: The size, or one that the disk was about to get.
    private func shrink(
        from old: UInt64, to new: UInt64, _ writing: Writing
    ) throws(ImageError) {
        ranges.lockEverything()
        defer { ranges.unlockEverything() }
        try storeSize(new, writing)
        writing.bitmaps.recordSize(from: old, to: new)
        currentSize.store(new, ordering: .releasing)
        let end = (new &+ map.clusterMask) & ~map.clusterMask
        allocation.restart()
        try dropClusters(end..<max(old, end), writing)
        try dropTables(from: header.l1EntryCountNeeded(for: new), writing)
        try clearTail(new..<end, writing)
        try writing.commit.now()
        try writing.commit.cutFile()
        try cutDataFile(to: new)
    }

    /// Makes `new` the size that the header has, durably.
    private func storeSize(_ new: UInt64, _ writing: Writing) throws(ImageError) {
        let old = size
        writing.header.change { $0.storeBigEndian(new, at: HeaderField.size) }
        do throws(ImageError) {
            try writing.commit.now()
        } catch {
            // The transaction that failed is tried again: the next one puts back what clients go on
            // with.
            writing.header.change { $0.storeBigEndian(old, at: HeaderField.size) }
            throw error
        }
    }

    /// Drops the clusters of `range` that lie in a table that stays.
    private func dropClusters(_ range: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        let tableEnd = header.l1EntryCountNeeded(for: size) &<< map.coverageBits
        var offset = range.lowerBound
        while offset < min(range.upperBound, tableEnd) {
            let extent = try map.extent(
                at: offset, limit: min(range.upperBound, tableEnd) &- offset)
            // What a bad entry means belongs to nobody.
            let isNothing = extent.kind == .unallocated && !extent.isReserved
            if !isNothing, extent.kind != .corrupt {
                try change(offset..<offset &+ extent.byteCount, writing) { _, _ in .unallocated }
            }
            offset &+= extent.byteCount
            try writing.commit.relieve()
        }
    }

    /// Drops whole tables with everything in them.  Every range lock is held.
    func dropTables(from first: UInt64, _ writing: Writing) throws(ImageError) {
        // Afterwards the file has the tables as they are.
        try writing.commit.now()
        let tables = map.l1Entries().dropFirst(Int(clamping: first)).map(\.withoutCopied)
        guard tables.contains(where: { $0.offset != 0 }) else { return }
        map.removeTables(from: Int(first), dropping: [])
        try writing.commit.now()
        try drop(TableTree(tables, in: top.file, header: header), writing)
    }

    /// Zeroes what lies behind the disk in its last cluster, for programs that show it when they
    /// make the disk larger; growing here does so anyway.
    private func clearTail(_ tail: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        // An external data file is cut there.
        guard !tail.isEmpty, !map.hasDataFile, try !isHole(tail) else { return }
        do throws(ImageError) {
            try writeZeroBytes(tail, writing)
        } catch  where error.isNoSpace {
            return
        }
    }
}
