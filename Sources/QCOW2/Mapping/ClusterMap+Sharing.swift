internal import Synchronization

/// What snapshots ask of the map.
extension ClusterMap {
    /// Guest clusters of a slice.
    package var sliceClusterCount: UInt64 { 1 &<< sliceBits }
    /// Guest clusters of a table.
    package var tableClusterCount: UInt64 { 1 &<< tableBits }

    /// The L1 table as it is; nothing may move it meanwhile.
    package func l1Entries() -> [L1Entry] { (0..<l1EntryCount).map { l1Entry($0) } }

    /// The index of the first L1 entry from `index` on that has a table.
    package func nextTable(from index: Int) -> Int {
        var index = index
        while index < l1EntryCount, l1Entry(index).offset == 0 { index += 1 }
        return index
    }

    /// Drops references that no entry of this map holds (any more).
    package func drop(_ runs: [ClusterRun]) {
        state.withLock { state in
            for run in runs { state.dropped.append(joining: run) }
        }
    }

    /// Clears COPIED in the whole L1 table: the tables are shared from here on.  Every range lock
    /// is held.
    package func clearCopiedOfTables() {
        state.withLock { state in
            for index in 0..<l1EntryCount where l1Entry(index).isCopied {
                table.pointee.entries[index].store(
                    l1Entry(index).withoutCopied.bits, ordering: .releasing)
                state.dirtyL1Pages.insert(index &>> 9)
            }
        }
    }

    /// Makes `entries` the L1 table, at `offset`, from the next commit on; the clusters of the old
    /// one lose their reference.  Every range lock is held, and nothing is dirty.
    package func replaceL1Table(by entries: [L1Entry], at offset: UInt64) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            let new = try L1Table(entryCount: entries.count, offset: offset, in: file)
            Self.store(entries, in: new.entries)
            state.dropped.append(joining: l1Clusters)
            table.pointee = new
            state.dirtyL1Pages.removeAll()
            state.hasMoved = true
            for slot in 0..<cache.slotCount where cache.slice(in: slot) != nil { cache.clear(slot) }
        }
    }

    private static func store(_ entries: [L1Entry], in array: borrowing AtomicArray) {
        for (index, entry) in entries.enumerated() {
            array[index].store(entry.bits, ordering: .relaxed)
        }
    }

    /// The entries of the slice that begins with guest cluster `cluster`; nil where the cache has
    /// no room for it before the next commit.  The slice has a table.
    package func entries(ofSliceAt cluster: UInt64) throws(ImageError) -> [L2Entry]? {
        while true {
            guard try ensure(cluster &>> sliceBits) else { return nil }
            let entries = state.withLock { _ -> [L2Entry]? in
                guard let (slot, _) = cache.find(cluster &>> sliceBits) else { return nil }
                return (0..<1 &<< Int(sliceBits)).map { cache.entry(in: slot, at: $0) }
            }
            if let entries { return entries }
        }
    }

    /// Whether enough is dirty that whoever makes much dirty should commit, so that clients need
    /// not wait for it.
    package var isHalfFull: Bool {
        let slotLimit = min(max(cache.slotCount / 8, 1), 1024)
        return state.withLock { $0.dirtySlots.count > slotLimit || $0.dropped.count > 1 << 15 }
    }
}
