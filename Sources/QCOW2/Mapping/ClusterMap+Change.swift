internal import Synchronization

/// Changes of the map.  Everything here keeps dirty tables and dropped references together, so
/// that a commit freezes both in one step.
extension ClusterMap {
    /// Whether the L2 table for `guest` may be changed in place.
    package func hasWritableTable(at guest: UInt64) -> Bool {
        let index = Int(truncatingIfNeeded: guest &>> coverageBits)
        return index < l1EntryCount && l1Entry(index).isCopiedAndKnown
            && l1Entry(index).offset & clusterMask == 0
    }

    /// Replaces the entries of `count` guest clusters from `cluster` on (an index, all in one
    /// writable table) by what `change` makes of them, and returns how many were replaced: fewer
    /// than `count` where the cache has no room before the next commit.
    ///
    /// References that an entry loses are dropped in the same step.  The caller holds the exclusive
    /// range lock, and the data that new entries show has been written.
    package func update(
        _ cluster: UInt64, count: Int, _ change: (_ index: Int, _ old: L2Entry) -> L2Entry
    ) throws(ImageError) -> Int {
        var done = 0
        while done < count {
            let slice = (cluster &+ UInt64(done)) &>> sliceBits
            let first = Int(truncatingIfNeeded: (cluster &+ UInt64(done)) & (1 &<< sliceBits &- 1))
            let part = min(count - done, 1 &<< Int(sliceBits) - first)
            guard try ensure(slice) else { return done }
            let found = state.withLock { state -> Bool in
                guard let (slot, _) = cache.find(slice) else { return false }
                for index in 0..<part {
                    let old = cache.entry(in: slot, at: first + index)
                    let new = change(done + index, old)
                    if new != old { replace(old, by: new, in: slot, at: first + index, &state) }
                }
                return true
            }
            if found { done += part }
        }
        return done
    }

    private func replace(
        _ old: L2Entry, by new: L2Entry, in slot: Int, at index: Int, _ state: inout State
    ) {
        cache.store(new, in: slot, at: index)
        if !state.marks[slot].contains(.dirty) {
            state.marks[slot].insert(.dirty)
            state.dirtySlots.append(slot)
        }
        if exposesData(new, over: old) { state.exposesData = true }
        // Clusters of a data file have no counts.
        if !hasDataFile, old.isCompressed || old.offset != new.offset {
            state.dropped.append(references: old, clusterBits: clusterBits)
        }
    }

    /// Whether `new` shows data that `old` did not show, or has a cluster of its own that was made
    /// for it: either must be in the file before the entry is.
    private func exposesData(_ new: L2Entry, over old: L2Entry) -> Bool {
        if new.offset != 0, new.offset != old.offset { return true }
        guard isExtended, !new.isCompressed else { return new.showsData }
        return new.subclusters.allocated & ~old.subclusters.allocated != 0
    }

    /// Points L1 entry `index` to a new table at `offset`, whose content, a copy of the old table
    /// without COPIED or all zeros, has been written; the old table loses a reference.
    package func replaceTable(_ index: Int, by offset: UInt64, clearingCopied: Bool) {
        state.withLock { state in
            if clearingCopied { clearCopied(inTable: index, &state) }
            // The new table is on the disk before the L1 entry, even if its count is there already.
            state.exposesData = true
            let old = l1Entry(index)
            table.pointee.entries[index].store(
                L1Entry(copiedTableAt: offset).bits, ordering: .releasing)
            state.dirtyL1Pages.insert(index &>> 9)
            if old.offset != 0 {
                state.dropped.append(
                    joining: ClusterRun(first: old.offset &>> clusterBits, count: 1))
            }
        }
    }

    /// Sets or clears COPIED of an L1 entry.
    package func setCopied(_ isCopied: Bool, ofTable index: Int) {
        state.withLock { state in
            let entry = l1Entry(index)
            guard entry.isCopied != isCopied else { return }
            let bits = isCopied ? entry.bits | L1Entry.copied : entry.bits & ~L1Entry.copied
            table.pointee.entries[index].store(bits, ordering: .releasing)
            state.dirtyL1Pages.insert(index &>> 9)
        }
    }

    /// The cached slices of a table get what its copy on disk has.
    private func clearCopied(inTable index: Int, _ state: inout State) {
        let slicesPerTable = 1 &<< (tableBits &- sliceBits)
        let first = UInt64(index) &<< (tableBits &- sliceBits)
        for slice in first..<first &+ UInt64(slicesPerTable) {
            guard let (slot, _) = cache.find(slice) else { continue }
            for entry in 0..<(1 &<< Int(sliceBits)) {
                let old = cache.entry(in: slot, at: entry)
                if old.isCopied, !old.isCompressed {
                    cache.store(old.withoutCopied, in: slot, at: entry)
                }
            }
        }
    }

    /// Drops the tables from L1 entry `first` on, with `dropped`, the references that they held.
    /// Every range lock is held.
    package func removeTables(from first: Int, dropping dropped: [ClusterRun]) {
        state.withLock { state in
            for index in first..<max(first, l1EntryCount) where l1Entry(index).bits != 0 {
                table.pointee.entries[index].store(0, ordering: .releasing)
                state.dirtyL1Pages.insert(index &>> 9)
            }
            for run in dropped { state.dropped.append(joining: run) }
            emptySlots(from: UInt64(first) &<< (tableBits &- sliceBits), &state)
        }
    }

    /// Forgets the slices from `slice` on: their tables are gone.
    private func emptySlots(from slice: UInt64, _ state: inout State) {
        for slot in 0..<cache.slotCount {
            guard let found = cache.slice(in: slot), found >= slice else { continue }
            state.dirtySlots.removeAll { $0 == slot }
            state.marks[slot].remove(.dirty)
            cache.clear(slot)
        }
    }

    /// Moves the L1 table to `offset`, where it has `count` entries; the clusters of the old one
    /// lose their reference.  Every range lock is held.
    package func moveL1Table(to offset: UInt64, count: Int) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            let new = try L1Table(entryCount: count, offset: offset, in: file)
            copyL1Entries(to: new.entries)
            state.dropped.append(joining: l1Clusters)
            table.pointee = new
            state.hasMoved = true
        }
    }

    private func copyL1Entries(to entries: borrowing AtomicArray) {
        for index in 0..<min(entries.count, l1EntryCount) {
            entries[index].store(l1Entry(index).bits, ordering: .relaxed)
        }
    }

    /// The host clusters of the L1 table.
    package var l1Clusters: ClusterRun {
        let byteCount = UInt64(l1EntryCount) &* 8
        return ClusterRun(
            first: table.pointee.offset &>> clusterBits,
            count: (byteCount &+ clusterMask) &>> clusterBits)
    }

    package var l1Offset: UInt64 { table.pointee.offset }
}
