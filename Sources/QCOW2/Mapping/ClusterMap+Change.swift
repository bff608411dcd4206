internal import Synchronization

/// Changes of the map.  Everything here keeps dirty tables and dropped references together, so
/// that a commit freezes both in one step.
extension ClusterMap {
    /// Whether the L2 table for `guest` may be changed in place.
    package func hasWritableTable(at guest: UInt64) -> Bool {
        let index = Int(truncatingIfNeeded: guest &>> coverageBits)
        return index < l1EntryCount && l1Entry(index).isCopied
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
        if new.showsData { state.exposesData = true }
        // Clusters of a data file have no counts.
        if !hasDataFile, old.isCompressed || old.offset != new.offset {
            state.dropped.append(references: old, clusterBits: clusterBits)
        }
    }

    /// Points L1 entry `index` to a new table at `offset`, whose content, a copy of the old table
    /// without COPIED or all zeros, has been written; the old table loses a reference.
    package func replaceTable(_ index: Int, by offset: UInt64, clearingCopied: Bool) {
        state.withLock { state in
            if clearingCopied { clearCopied(inTable: index, &state) }
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
    package func moveL1Table(to offset: UInt64, count: Int) {
        state.withLock { state in
            state.dropped.append(joining: l1Clusters)
            let entries = AtomicArray(count: count)
            copyL1Entries(to: entries)
            table.pointee = L1Table(entries: entries, offset: offset)
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

    // MARK: For a commit

    /// Whether so much is dirty that writers should wait for a commit.
    package var isOverfull: Bool {
        let slotLimit = min(max(cache.slotCount / 4, 2), 2048)
        return state.withLock { $0.dirtySlots.count > slotLimit || $0.dropped.count > 1 << 16 }
    }

    /// Calls `body` with what was changed since the last freeze, in one step with respect to every
    /// change; what it was given counts as unchanged from here on, and stays in memory until
    /// `thaw`.
    package func freeze<Result>(_ body: (FrozenMap) -> Result) -> Result {
        state.withLock { state in
            var frozen = FrozenMap()
            frozen.dropped = state.dropped
            frozen.exposesData = state.exposesData
            for slot in state.dirtySlots { freezeSlot(slot, &state, &frozen) }
            if state.hasMoved {
                frozen.movedL1Table = l1Bytes(0..<l1EntryCount)
                frozen.l1Offset = table.pointee.offset
            } else {
                for page in state.dirtyL1Pages.sorted() {
                    frozen.tables.append(
                        l1Bytes(page &<< 9..<min((page &+ 1) &<< 9, l1EntryCount)),
                        at: table.pointee.offset &+ UInt64(page) &<< 12)
                }
            }
            state.frozenSlots += state.dirtySlots
            state.dirtySlots.removeAll(keepingCapacity: true)
            state.dirtyL1Pages.removeAll(keepingCapacity: true)
            state.hasMoved = false
            state.dropped = []
            state.exposesData = false
            return body(frozen)
        }
    }

    private func freezeSlot(_ slot: Int, _ state: inout State, _ frozen: inout FrozenMap) {
        guard let slice = cache.slice(in: slot) else { return }
        state.marks[slot].remove(.dirty)
        state.marks[slot].insert(.frozen)
        let l1Index = Int(truncatingIfNeeded: slice &>> (tableBits &- sliceBits))
        let inTable = slice & (1 &<< (tableBits &- sliceBits) &- 1)
        let entries = cache.entries(of: slot)
        frozen.tables.append(
            count: 1 &<< Int(sliceBits), at: l1Entry(l1Index).offset &+ inTable &<< (sliceBits &+ 3)
        ) { entries[$0].load(ordering: .relaxed) }
    }

    private func l1Bytes(_ range: Range<Int>) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: range.count * 8)
        for index in range {
            bytes.storeBigEndian(l1Entry(index).bits, at: (index - range.lowerBound) * 8)
        }
        return bytes
    }

    /// What was frozen is durable: its slots may leave memory again.
    package func thaw() {
        state.withLock { state in
            for slot in state.frozenSlots { state.marks[slot].remove(.frozen) }
            state.frozenSlots.removeAll(keepingCapacity: true)
        }
        state.announceChange()
    }

    /// Whether anything was changed since the last freeze.
    package var isDirty: Bool {
        state.withLock {
            !$0.dirtySlots.isEmpty || !$0.dirtyL1Pages.isEmpty || $0.hasMoved || !$0.dropped.isEmpty
        }
    }
}

/// Copies of what a commit writes of a map, taken in one step.
package struct FrozenMap: Sendable {
    /// Changed parts of tables that exist, for phase 2.
    package var tables = FrozenPages()
    /// The whole L1 table, where it moved, for phase 1, and where it is now.
    package var movedL1Table: [UInt8]?
    package var l1Offset: UInt64 = 0
    /// References that are gone once phase 2 is durable.
    package var dropped: [ClusterRun] = []
    /// Whether the entries show data that phase 1 must make durable.
    package var exposesData = false

    package init() {}
}

/// Bytes and where they go; neighbours are one write.
package struct FrozenPages: Sendable {
    package struct Piece: Sendable {
        /// Host offset of the first byte.
        package var offset: UInt64
        package var bytes: [UInt8]
    }

    package private(set) var pieces: [Piece] = []

    package init() {}

    package var isEmpty: Bool { pieces.isEmpty }

    package mutating func append(_ bytes: [UInt8], at offset: UInt64) {
        if let last = pieces.last, last.offset &+ UInt64(last.bytes.count) == offset {
            pieces[pieces.count - 1].bytes += bytes
        } else {
            pieces.append(Piece(offset: offset, bytes: bytes))
        }
    }

    /// Appends `count` table entries, which `entry` gives in the host's byte order.
    package mutating func append(count: Int, at offset: UInt64, entry: (Int) -> UInt64) {
        var bytes = [UInt8](repeating: 0, count: count * 8)
        bytes.withUnsafeMutableBytes { room in
            for index in 0..<count { room.storeBigEndian(entry(index), at: index &* 8) }
        }
        append(bytes, at: offset)
    }
}
