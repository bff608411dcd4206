internal import Glibc
internal import Synchronization

/// Decompressed clusters kept in memory, so that sixteen reads of 4 KiB do not inflate a cluster of
/// 64 KiB sixteen times.
///
/// Any method may be called from any thread.  A hit takes no lock: it pins the slot, copies, and
/// lets go.  A miss inflates with no lock held; who wants the same cluster meanwhile waits for it,
/// everybody else goes on.  Slots are grouped in sets, a cluster may lie in any slot of its set,
/// and within a set CLOCK decides who goes.
package struct DecompressedCache: ~Copyable, Sendable {
    /// One compressed stream of an image's chain.
    package struct Key: Equatable, Sendable {
        fileprivate let words: CacheSlots.Words

        /// - Parameters:
        ///   - layer: the layer's number in the chain, below 256.
        ///   - hostOffset: where the stream begins in its file, below 2^56.
        ///   - byteCount: how many bytes of the file it may take, at least 1.
        @inline(__always)
        package init(layer: Int, hostOffset: UInt64, byteCount: Int) {
            words = CacheSlots.Words(
                place: hostOffset | UInt64(truncatingIfNeeded: layer) &<< 56,
                byteCount: UInt64(truncatingIfNeeded: byteCount))
        }
    }

    private let slots: CacheSlots
    private let setCount: Int
    private let slotsPerSet: Int
    /// Whether any slot was ever filled; until then there is nothing to forget.
    private let isUsed = Atomic<Bool>(false)
    /// Guards which slot is to hold which cluster, and where CLOCK goes on, a set each.  Held for
    /// a search, never while a cluster is inflated or copied; a change is a slot that was filled.
    private let hands: Monitor<[Int]>

    /// - Parameters:
    ///   - byteCount: what the clusters may take, in bytes.  0 turns the cache off; anything else
    ///     is at least two clusters.
    ///   - clusterByteCount: the largest cluster size in the chain, in bytes.
    package init(byteCount: Int, clusterByteCount: Int) throws(ImageError) {
        // `forget` looks at every slot: with tiny clusters the number is the bound, not the bytes.
        let wanted = byteCount <= 0 ? 0 : min(max(2, byteCount / max(1, clusterByteCount)), 8192)
        slots = try CacheSlots(count: wanted, slotByteCount: clusterByteCount)
        setCount = max(1, slots.count / 16)
        slotsPerSet = slots.count / setCount
        hands = Monitor(Array(repeating: 0, count: setCount))
    }

    /// Copies decompressed bytes of one cluster to `target`, from `offset` in the cluster on.
    ///
    /// `fill` is called when the cluster is not in memory, with room for all `clusterByteCount`
    /// bytes of it.  What it throws is thrown on, and the next caller tries again.
    package borrowing func copy<Failure>(
        _ key: Key, clusterByteCount: Int, from offset: Int,
        into target: UnsafeMutableRawBufferPointer,
        fill: (UnsafeMutableRawBufferPointer) throws(Failure) -> Void
    ) throws(Failure) {
        precondition(
            offset >= 0 && offset <= clusterByteCount && target.count <= clusterByteCount - offset,
            "a read of a cluster stays inside it")
        let set = firstSlot(of: key)
        for slot in set..<(set &+ slotsPerSet) where slots.holds(key.words, slot) {
            if slots.pin(slot, holding: key.words) {
                copyOut(slot, from: offset, into: target)
                return
            }
        }
        try copyMissing(
            key, clusterByteCount: clusterByteCount, from: offset, into: target, fill: fill)
    }

    /// Drops the clusters of `layer` whose streams touch `hostRange`: what lies there is about to
    /// become something else.
    package borrowing func forget(layer: Int, hostRange: Range<UInt64>) {
        guard isUsed.load(ordering: .relaxed), !hostRange.isEmpty else { return }
        let layerBits = UInt64(truncatingIfNeeded: layer) &<< 56
        hands.withLock { _ in
            for slot in 0..<slots.count {
                let words = slots.words(of: slot)
                // The difference is the offset where the layer is ours, and huge where it is not.
                let start = words.place ^ layerBits
                // Offset and length are below 2^57: no overflow.
                if start < hostRange.upperBound, start &+ words.byteCount > hostRange.lowerBound {
                    // A read or a fill under way goes on; nobody finds the slot any more.
                    slots.setWords(.none, of: slot)
                }
            }
        }
    }

    /// What to do about a cluster that is not in memory.
    private enum Answer {
        /// It has come in the meantime; the slot is pinned.
        case pinned(Int)
        /// The caller fills this slot.
        case claimed(Int)
        /// Every slot of the set is in use.
        case full
    }

    @inline(never)
    private borrowing func copyMissing<Failure>(
        _ key: Key, clusterByteCount: Int, from offset: Int,
        into target: UnsafeMutableRawBufferPointer,
        fill: (UnsafeMutableRawBufferPointer) throws(Failure) -> Void
    ) throws(Failure) {
        let fits = clusterByteCount <= slots.slotByteCount
        switch slots.count > 0 && fits ? slot(for: key) : .full {
        case .pinned(let slot): copyOut(slot, from: offset, into: target)
        case .claimed(let slot):
            let cluster = slots.bytes(of: slot)[..<clusterByteCount]
            do {
                try fill(UnsafeMutableRawBufferPointer(rebasing: cluster))
            } catch {
                finish(slot, isWhole: false)
                throw error
            }
            finish(slot, isWhole: true)
            copyOut(slot, from: offset, into: target)
        case .full where target.count == clusterByteCount: try fill(target)
        case .full:
            let whole = UnsafeMutableRawBufferPointer.allocate(
                byteCount: clusterByteCount, alignment: 4096)
            defer { whole.deallocate() }
            try fill(whole)
            let part = whole[offset...].prefix(target.count)
            target.copyMemory(from: UnsafeRawBufferPointer(rebasing: part))
        }
    }

    /// Copies from a pinned slot and lets go of it.
    @inline(__always)
    private borrowing func copyOut(
        _ slot: Int, from offset: Int, into target: UnsafeMutableRawBufferPointer
    ) {
        if let address = target.baseAddress, let source = slots.bytes(of: slot).baseAddress {
            memcpy(address, source + offset, target.count)
        }
        slots.unpin(slot)
    }

    /// Finds or claims a slot, and waits while somebody else is filling one for `key`.
    private borrowing func slot(for key: Key) -> Answer {
        let set = firstSlot(of: key)
        let candidates = set..<(set + slotsPerSet)
        return hands.waitFor { hands in
            if let slot = candidates.first(where: { slots.holds(key.words, $0) }) {
                return slots.pin(slot, holding: key.words) ? .pinned(slot) : nil
            }
            guard let slot = victim(in: candidates, hand: &hands[set / slotsPerSet]) else {
                return .full
            }
            slots.setWords(key.words, of: slot)
            isUsed.store(true, ordering: .relaxed)
            return .claimed(slot)
        }
    }

    /// A slot of the set to use anew, made exclusive: an empty one, or the one CLOCK stops at.
    private borrowing func victim(in candidates: Range<Int>, hand: inout Int) -> Int? {
        for slot in candidates where slots.isEmpty(slot) && slots.claim(slot) { return slot }
        for _ in 0..<(2 * candidates.count) {
            let slot = candidates.lowerBound + hand
            hand = (hand + 1) % candidates.count
            if slots.claim(slot) { return slot }
        }
        return nil
    }

    /// Ends the filling of `slot` and wakes who waits for it; a whole one stays pinned once.
    private borrowing func finish(_ slot: Int, isWhole: Bool) {
        hands.withLock { _ in
            if isWhole { slots.publish(slot) } else { slots.abandon(slot) }
        }
        hands.announceChange()
    }

    /// Where the set of `key` begins.
    @inline(__always)
    private borrowing func firstSlot(of key: Key) -> Int {
        // Fibonacci hashing; the high half of a product spreads it over the sets evenly.
        let hash = (key.words.place ^ key.words.byteCount &<< 32) &* 0x9e37_79b9_7f4a_7c15
        let set = hash.multipliedFullWidth(by: UInt64(truncatingIfNeeded: setCount)).high
        return Int(truncatingIfNeeded: set) &* slotsPerSet
    }
}
