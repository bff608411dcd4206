extension ReferenceWalk {
    /// The end of what has a count: the last cluster of the file, or one that is cut short there.
    var clusterEnd: UInt64 {
        let whole = fileByteCount >> UInt64(header.clusterBits)
        return max(
            fileByteCount & (clusterByteCount &- 1) == 0 ? whole : whole &+ 1,
            (counts.highestCluster ?? 0) &+ 1)
    }
}

/// Reading tables, for the walk and for who looks at them again.
extension ReferenceWalk {
    /// L2 tables that `run()` and a second look at the active ones read, at most.
    func tableCount() throws(ImageError) -> UInt64 {
        let snapshots = try header.readSnapshots(from: device).snapshots
        // At most 65536 snapshots with 2^32 entries each.
        return snapshots.reduce(2 * UInt64(try activeL1Entries().count)) {
            $0 + UInt64($1.l1EntryCount)
        }
    }

    /// The entries of the active L1 table that are not zero, with their places in it.
    func activeL1Entries() throws(ImageError) -> [(index: UInt64, entry: L1Entry)] {
        var entries: [(UInt64, L1Entry)] = []
        try forEachEntry(at: header.l1Offset, entryCount: UInt64(header.l1EntryCount)) {
            entries.append(($0, L1Entry(bits: $1)))
        }
        return entries
    }

    /// The entries of an L2 table that are not all zero.
    func l2Entries(at offset: UInt64) throws(ImageError) -> [L2Entry] {
        var entries: [L2Entry] = []
        try l2Tables.forEach(at: [offset]) { $0.forEachEntry { entries.append($0) } }
        return entries
    }

    /// What it takes to read L2 tables, without the counts.
    var l2Tables: StoredL2Tables {
        StoredL2Tables(
            device: device, byteCount: Int(clusterByteCount), isExtended: isExtended,
            fileByteCount: fileByteCount, threadCount: threadCount, tableRead: tableRead)
    }

    /// Whether L2 entries have a second word.
    var isExtended: Bool { header.l2EntryByteCount == 16 }
}
