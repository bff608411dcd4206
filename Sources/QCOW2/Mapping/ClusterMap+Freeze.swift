internal import Synchronization

/// What a commit asks of the map.
extension ClusterMap {
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
        let words = cache.words(of: slot)
        frozen.tables.append(
            count: 1 &<< cache.wordBits,
            at: l1Entry(l1Index).offset &+ inTable &<< (sliceBits &+ entryBits)
        ) { words[$0].load(ordering: .relaxed) }
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

    /// Appends `count` words of a table, which `word` gives in the host's byte order.
    package mutating func append(count: Int, at offset: UInt64, word: (Int) -> UInt64) {
        var bytes = [UInt8](repeating: 0, count: count * 8)
        bytes.withUnsafeMutableBytes { room in
            for index in 0..<count { room.storeBigEndian(word(index), at: index &* 8) }
        }
        append(bytes, at: offset)
    }
}
