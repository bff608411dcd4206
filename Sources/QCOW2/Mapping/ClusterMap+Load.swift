internal import Synchronization

/// Bringing slices of L2 tables into the cache.
extension ClusterMap {
    private enum Claim {
        case present
        case slot(Int)
        /// Every way of the set is pinned.
        case noRoom
    }

    /// Loads `slice`, so that the caller can look again; answers itself, from a copy of its own,
    /// where no slot is free.  Nobody changes a slice that is not in the cache, and the caller's
    /// range lock keeps its own entries still.
    @inline(never)
    func load(
        _ slice: UInt64, of entry: L1Entry, _ l1Index: Int, thenAt index: Int, _ guest: UInt64,
        _ limit: UInt64
    ) throws(ImageError) -> Extent? {
        guard case .noRoom = try load(slice, of: entry, l1Index) else { return nil }
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: 1 &<< Int(sliceBits &+ entryBits), alignment: 8)
        defer { buffer.deallocate() }
        try file.read(into: buffer, at: offset(of: slice, in: entry))
        let words = buffer.bindMemory(to: UInt64.self)
        for word in words.indices { words[word] = UInt64(bigEndian: words[word]) }
        guard l1Entry(l1Index).offset == entry.offset, let base = buffer.baseAddress else {
            return nil
        }
        return run(
            UnsafePointer(base.assumingMemoryBound(to: Atomic<UInt64>.self)), index, guest, limit,
            tableIsCopied: entry.isCopied)
    }

    private func load(
        _ slice: UInt64, of entry: L1Entry, _ l1Index: Int
    ) throws(ImageError) -> Claim {
        let claim = state.waitFor { state in claimSlot(for: slice, &state) }
        guard case .slot(let slot) = claim else { return claim }
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: 1 &<< Int(sliceBits &+ entryBits), alignment: 8)
        defer { buffer.deallocate() }
        var failure: ImageError?
        do throws(ImageError) {
            try file.read(into: buffer, at: offset(of: slice, in: entry))
        } catch {
            failure = error
        }
        state.withLock { state in
            state.marks[slot].remove(.loading)
            state.loading.removeAll { $0 == slice }
            // The table may have been replaced by a copy meanwhile: then the caller looks again.
            if failure == nil, l1Entry(l1Index).offset == entry.offset {
                cache.fill(slot, with: slice, from: UnsafeRawBufferPointer(buffer))
            }
        }
        state.announceChange()
        if let failure { throw failure }
        return claim
    }

    private func claimSlot(for slice: UInt64, _ state: inout State) -> Claim? {
        if cache.find(slice) != nil { return .present }
        if state.loading.contains(slice) { return nil }
        guard let slot = cache.victim(for: slice, isFree: { state.marks[$0].isEmpty }) else {
            return .noRoom
        }
        cache.clear(slot)
        state.marks[slot].insert(.loading)
        state.loading.append(slice)
        return .slot(slot)
    }

    /// Host offset of `slice` of the table that `entry` points to.
    private func offset(of slice: UInt64, in entry: L1Entry) -> UInt64 {
        entry.offset &+ (slice & (1 &<< (tableBits &- sliceBits) &- 1)) &<< (sliceBits &+ entryBits)
    }

    /// Makes sure that `slice` is in the cache.  False: every slot it may take is waiting for a
    /// commit.
    func ensure(_ slice: UInt64) throws(ImageError) -> Bool {
        let l1Index = Int(truncatingIfNeeded: slice &>> (tableBits &- sliceBits))
        while cache.find(slice) == nil {
            if case .noRoom = try load(slice, of: l1Entry(l1Index), l1Index) { return false }
        }
        return true
    }
}
