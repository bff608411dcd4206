internal import Glibc
package import Synchronization

/// Slices of L2 tables in memory, found without a lock and without a reference count.
///
/// A slice is 4 KiB of a table (or the whole of a smaller one).  Memory is one slab, cut at start
/// into slots, eight ways a set; a slice may sit in any way of the set its number selects.  Readers
/// never wait: they read the slot's version, the entries, and the version again, and take what
/// they read only if the version is even and has not moved (a sequence lock).  Who fills or empties
/// a slot, or marks it, holds the lock of the cluster map.
package struct SliceCache: ~Copyable, Sendable {
    static let ways = 8

    /// Words of a slice, and of an entry (1, or 2 where entries are extended), as powers of two.
    package let wordBits: Int
    private let entryWordBits: Int
    private let setBits: Int
    /// Even: the slot is whole.  Odd: somebody is filling it.
    private let versions: AtomicArray
    /// Which slice the slot holds, as slice number + 1; 0 is none.
    private let keys: AtomicArray
    /// 1 when the slot was used since the clock hand passed.
    private let used: AtomicArray
    private let words: AtomicArray

    /// - Parameter byteCount: room for entries, in bytes; at least two sets are made.
    /// - Throws: where the memory cannot be had.
    package init(wordBits: Int, entryWordBits: Int, byteCount: Int, of file: String = "")
        throws(ImageError)
    {
        let slots = byteCount >> (wordBits + 3)
        var bits = 1
        while bits < 24, SliceCache.ways << (bits + 1) <= slots { bits += 1 }
        let slotCount = SliceCache.ways << bits
        let purpose = "a cache of \(slotCount << (wordBits + 3)) bytes of L2 tables"
        let words = try AtomicArray(count: slotCount << wordBits, for: purpose, of: file)
        let versions = try AtomicArray(count: slotCount, for: purpose, of: file)
        let keys = try AtomicArray(count: slotCount, for: purpose, of: file)
        used = try AtomicArray(count: slotCount, for: purpose, of: file)
        self.words = words
        self.versions = versions
        self.keys = keys
        self.wordBits = wordBits
        self.entryWordBits = entryWordBits
        setBits = bits
    }

    package var slotCount: Int { SliceCache.ways << setBits }

    @inline(__always)
    private func firstSlot(of slice: UInt64) -> Int {
        let mixed = slice &* 0x9E37_79B9_7F4A_7C15
        return Int(truncatingIfNeeded: mixed &>> UInt64(64 &- setBits)) &* SliceCache.ways
    }

    /// The slot that holds `slice` and the version to check what is read there against, or nil.
    @inline(__always)
    package borrowing func find(_ slice: UInt64) -> (slot: Int, version: UInt64)? {
        let first = firstSlot(of: slice)
        for slot in first..<first &+ SliceCache.ways
        where keys[slot].load(ordering: .relaxed) == slice &+ 1 {
            let version = versions[slot].load(ordering: .acquiring)
            if version & 1 == 0, keys[slot].load(ordering: .relaxed) == slice &+ 1 {
                if used[slot].load(ordering: .relaxed) == 0 {
                    used[slot].store(1, ordering: .relaxed)
                }
                return (slot, version)
            }
        }
        return nil
    }

    /// Whether what was read from `slot` since `find` belongs together.
    @inline(__always)
    package borrowing func isUnchanged(_ slot: Int, _ version: UInt64) -> Bool {
        atomicMemoryFence(ordering: .acquiring)  // pairs with the releasing fence in `fill`
        return versions[slot].load(ordering: .relaxed) == version
    }

    /// The words of the entries of `slot`, `1 << wordBits` of them.
    @inline(__always)
    package borrowing func words(of slot: Int) -> UnsafePointer<Atomic<UInt64>> {
        words.address(slot &<< wordBits)
    }

    // MARK: Under the lock of the cluster map

    /// A slot that `slice` may move into: an empty one, or one that was not used lately.
    package borrowing func victim(for slice: UInt64, isFree: (Int) -> Bool) -> Int? {
        let first = firstSlot(of: slice)
        var unused: Int?
        for slot in first..<first &+ SliceCache.ways where isFree(slot) {
            if keys[slot].load(ordering: .relaxed) == 0 { return slot }
            if used[slot].load(ordering: .relaxed) == 0 { unused = slot }
        }
        if let unused { return unused }
        // Everybody was used: forget that, and take the way that the slice's number points to.
        var candidate: Int?
        for way in 0..<SliceCache.ways {
            let slot = first &+ (way &+ Int(truncatingIfNeeded: slice)) & (SliceCache.ways &- 1)
            guard isFree(slot) else { continue }
            used[slot].store(0, ordering: .relaxed)
            if candidate == nil { candidate = slot }
        }
        return candidate
    }

    /// The slice in `slot`, nil when it is empty.
    package borrowing func slice(in slot: Int) -> UInt64? {
        let key = keys[slot].load(ordering: .relaxed)
        return key == 0 ? nil : key &- 1
    }

    /// Puts `bytes`, the slice as it is on disk, into `slot` in place of what was there.
    package borrowing func fill(_ slot: Int, with slice: UInt64, from bytes: UnsafeRawBufferPointer)
    {
        beginChange(slot)
        for index in 0..<(1 &<< wordBits) {
            words[slot &<< wordBits &+ index].store(
                bytes.bigEndian(at: index &* 8) ?? 0, ordering: .relaxed)
        }
        keys[slot].store(slice &+ 1, ordering: .relaxed)
        used[slot].store(1, ordering: .relaxed)
        versions[slot].wrappingAdd(1, ordering: .releasing)
    }

    /// Empties `slot`.
    package borrowing func clear(_ slot: Int) {
        beginChange(slot)
        versions[slot].wrappingAdd(1, ordering: .releasing)
    }

    private borrowing func beginChange(_ slot: Int) {
        beginStores(slot)
        keys[slot].store(0, ordering: .relaxed)
    }

    /// Whoever sees one of the stores that follow sees the odd version too: pairs with the fence
    /// in `isUnchanged`.
    private borrowing func beginStores(_ slot: Int) {
        versions[slot].wrappingAdd(1, ordering: .relaxed)
        atomicMemoryFence(ordering: .releasing)
    }

    /// Changes one entry in place; readers see the old or the new one.
    package borrowing func store(_ entry: L2Entry, in slot: Int, at index: Int) {
        let first = slot &<< wordBits &+ index &<< entryWordBits
        guard entryWordBits > 0 else {
            return words[first].store(entry.bits, ordering: .releasing)
        }
        beginStores(slot)
        words[first].store(entry.bits, ordering: .relaxed)
        words[first &+ 1].store(entry.subclusters.bits, ordering: .relaxed)
        versions[slot].wrappingAdd(1, ordering: .releasing)
    }

    package borrowing func entry(in slot: Int, at index: Int) -> L2Entry {
        let first = slot &<< wordBits &+ index &<< entryWordBits
        let bits = words[first].load(ordering: .relaxed)
        guard entryWordBits > 0 else { return L2Entry(bits: bits) }
        return L2Entry(
            bits: bits,
            subclusters: SubclusterBitmap(bits: words[first &+ 1].load(ordering: .relaxed)))
    }
}
