internal import Synchronization

/// Looking up in tables of extended entries, and which bytes are which subclusters.
extension ClusterMap {
    /// The size of what is allocated at once in bytes, less 1.
    @inline(__always) var subclusterMask: UInt64 { 1 &<< subclusterBits &- 1 }

    /// The run from `index` of a slice's extended entries on.  Where there are host clusters they
    /// follow each other, whatever the run shows of them.
    @inline(never)
    func extendedRun(
        _ words: UnsafePointer<Atomic<UInt64>>, _ index: Int, _ guest: UInt64, _ limit: UInt64,
        tableIsCopied: Bool
    ) -> Extent {
        let entry = extendedEntry(words, index)
        let intoCluster = guest & clusterMask
        let clusterByteCount = clusterMask &+ 1
        let first = Int(truncatingIfNeeded: intoCluster &>> subclusterBits)
        let kind = kind(of: entry, subcluster: first, at: guest &- intoCluster)
        if kind == .compressed || kind == .corrupt {
            return Extent(
                kind, host: entry.bits, byteCount: min(clusterByteCount &- intoCluster, limit))
        }
        let hasCluster = hasCluster(entry)
        let step = hasCluster ? clusterByteCount : 0
        var end = entry.endOfSubclusters(kind, from: first)
        var byteCount = UInt64(end) &<< subclusterBits &- intoCluster
        var expected = entry.bits &+ step
        var next = index &+ 1
        while end == SubclusterBitmap.count, byteCount < limit, next < 1 &<< Int(sliceBits) {
            let following = extendedEntry(words, next)
            // Where the clusters follow each other, those of a data file are in their places too.
            guard following.bits == expected,
                following.kind(
                    ofSubcluster: 0, hasCluster: hasCluster, clusterMask: clusterMask) == kind
            else { break }
            end = following.endOfSubclusters(kind, from: 0)
            byteCount &+= UInt64(end) &<< subclusterBits
            expected &+= step
            next &+= 1
        }
        var extent = Extent(
            kind, isCopied: tableIsCopied && entry.isCopiedAndKnown,
            host: hasCluster ? entry.offset &+ intoCluster : 0, byteCount: min(byteCount, limit))
        extent.isReserved = kind == .unallocated && hasCluster
        return extent
    }

    /// Whether an entry has a host cluster of its own.
    @inline(__always)
    func hasCluster(_ entry: L2Entry) -> Bool {
        !entry.isCompressed && entry.hasCluster(inDataFile: hasDataFile)
    }

    @inline(__always)
    private func kind(of entry: L2Entry, subcluster: Int, at guest: UInt64) -> ClusterKind {
        let hasCluster = hasCluster(entry)
        // A data file has no streams, and a place for each cluster.
        if hasDataFile, entry.isCompressed || hasCluster && entry.offset != guest {
            return .corrupt
        }
        return entry.kind(
            ofSubcluster: subcluster, hasCluster: hasCluster, clusterMask: clusterMask)
    }

    /// Bit 0 of the first word has no meaning here.
    @inline(__always)
    private func extendedEntry(
        _ words: UnsafePointer<Atomic<UInt64>>, _ index: Int
    ) -> L2Entry {
        let first = words + index &* 2
        let bits = first.pointee.load(ordering: .relaxed)
        return L2Entry(
            bits: bits & L2Entry.compressed == 0 ? bits & ~L2Entry.zero : bits,
            subclusters: SubclusterBitmap(bits: (first + 1).pointee.load(ordering: .relaxed)))
    }

    /// Which subclusters of guest cluster `cluster` (an index) guest bytes `range`, which begin
    /// and end with a subcluster or outside of it, touch.
    func subclusters(of range: Range<UInt64>, inCluster cluster: UInt64) -> UInt32 {
        let start = cluster &<< clusterBits
        let part = range.clamped(to: start..<start &+ clusterMask &+ 1)
        let first = (part.lowerBound &- start) &>> subclusterBits
        let end = (part.upperBound &- start &+ subclusterMask) &>> subclusterBits
        return SubclusterBitmap.set(Int(first)..<Int(end))  // at most 32
    }

    /// The entry of a guest cluster (an index), whose range lock the caller holds; nothing where
    /// there is no table.
    package func entry(of cluster: UInt64) throws(ImageError) -> L2Entry {
        let l1Index = Int(truncatingIfNeeded: cluster &>> tableBits)
        while true {
            guard l1Index < l1EntryCount, case let table = l1Entry(l1Index), table.offset != 0
            else { return .unallocated }
            guard try ensure(cluster &>> sliceBits) else {
                if let entry = try storedEntry(of: cluster, in: table) { return entry }
                continue
            }
            let found = state.withLock { _ -> L2Entry? in
                guard let (slot, _) = cache.find(cluster &>> sliceBits) else { return nil }
                return cache.entry(
                    in: slot, at: Int(truncatingIfNeeded: cluster & (1 &<< sliceBits &- 1)))
            }
            if let found { return found }
        }
    }

    /// The entry as the file has it, which is the live one while its slice is not in the cache;
    /// nil where the table was replaced meanwhile.
    private func storedEntry(
        of cluster: UInt64, in table: L1Entry
    ) throws(ImageError) -> L2Entry? {
        let index = cluster & (1 &<< tableBits &- 1)
        var words: [UInt8] = Array(repeating: 0, count: 16)
        try words.withMutableRawBytes { buffer throws(ImageError) in
            let entry = UnsafeMutableRawBufferPointer(rebasing: buffer[..<(1 &<< Int(entryBits))])
            try file.read(into: entry, at: table.offset &+ index &<< entryBits)
        }
        guard l1Entry(Int(truncatingIfNeeded: cluster &>> tableBits)).offset == table.offset else {
            return nil
        }
        return words.withRawBytes {
            L2Entry(
                bits: $0.bigEndian(at: 0) ?? 0,
                subclusters: SubclusterBitmap(bits: $0.bigEndian(at: 8) ?? 0))
        }
    }
}
