internal import Glibc
internal import Synchronization

/// The memory of a cluster cache: slots of one size, each with a key and a state.
///
/// A slot is empty, exclusive (somebody is filling it) or whole.  Only a whole slot can be pinned,
/// and only a whole slot without pins becomes exclusive, so whoever holds a pin may read the bytes.
/// Memory is taken as slots are filled: `calloc` gives large areas as untouched zero pages.
struct CacheSlots: ~Copyable, @unchecked Sendable {
    // `@unchecked`: the tables hold nothing but atomics, and a slot's bytes are written only while
    // it is exclusive and read only while it is pinned.

    /// Which cluster a slot holds: the two words of a `DecompressedCache.Key`; zeros for none.
    struct Words: Equatable {
        var place: UInt64
        var byteCount: UInt64
        static var none: Words { Words(place: 0, byteCount: 0) }
    }

    /// How many slots there are; 0 where the memory could not be had.
    let count: Int
    let slotByteCount: Int
    private let places: AtomicArray
    private let byteCounts: AtomicArray
    private let states: AtomicArray
    private let slab: UnsafeMutableRawPointer?

    // A state: the pins in the low 32 bits, and these.
    private static var whole: UInt64 { 1 << 32 }
    private static var exclusive: UInt64 { 1 << 33 }
    private static var referenced: UInt64 { 1 << 34 }

    init(count wanted: Int, slotByteCount: Int) throws(ImageError) {
        let purpose = "\(wanted) decompressed clusters"
        let places = try AtomicArray(count: wanted, for: purpose)
        let byteCounts = try AtomicArray(count: wanted, for: purpose)
        states = try AtomicArray(count: wanted, for: purpose)
        self.places = places
        self.byteCounts = byteCounts
        slab = wanted == 0 ? nil : calloc(wanted, slotByteCount)
        count = slab == nil ? 0 : wanted
        self.slotByteCount = slotByteCount
    }

    deinit { free(slab) }

    /// The bytes of a slot, for whoever holds a pin or filled it.
    @inline(__always)
    borrowing func bytes(of slot: Int) -> UnsafeMutableRawBufferPointer {
        UnsafeMutableRawBufferPointer(
            start: slab.map { $0 + slot &* slotByteCount }, count: slotByteCount)
    }

    @inline(__always)
    borrowing func holds(_ words: Words, _ slot: Int) -> Bool {
        places[slot].load(ordering: .relaxed) == words.place
            && byteCounts[slot].load(ordering: .relaxed) == words.byteCount
    }

    @inline(__always)
    borrowing func words(of slot: Int) -> Words {
        Words(
            place: places[slot].load(ordering: .relaxed),
            byteCount: byteCounts[slot].load(ordering: .relaxed))
    }

    borrowing func setWords(_ words: Words, of slot: Int) {
        places[slot].store(words.place, ordering: .relaxed)
        byteCounts[slot].store(words.byteCount, ordering: .relaxed)
    }

    /// Pins `slot` if it is whole and holds `words`.
    @inline(__always)
    borrowing func pin(_ slot: Int, holding words: Words) -> Bool {
        var state = states[slot].load(ordering: .relaxed)
        repeat {
            guard state & Self.whole != 0 else { return false }
            // Acquiring pairs with `publish`: the words and the bytes stored before it are visible.
            let (exchanged, found) = states[slot].weakCompareExchange(
                expected: state, desired: (state &+ 1) | Self.referenced,
                successOrdering: .acquiring, failureOrdering: .relaxed)
            if exchanged { break }
            state = found
        } while true
        // The slot may have been given to another cluster since the caller looked.
        if holds(words, slot) { return true }
        unpin(slot)
        return false
    }

    /// Releasing pairs with the exchange in `claim`: our reads of the bytes are over.
    @inline(__always)
    borrowing func unpin(_ slot: Int) {
        states[slot].wrappingSubtract(1, ordering: .releasing)
    }

    borrowing func isEmpty(_ slot: Int) -> Bool {
        states[slot].load(ordering: .relaxed) == 0
    }

    /// Makes `slot` exclusive if it is empty, or whole, without pins and not used of late;
    /// one that was used of late is spared this time.
    borrowing func claim(_ slot: Int) -> Bool {
        let state = states[slot].load(ordering: .relaxed)
        guard state == 0 || state == Self.whole else {
            if state == Self.whole | Self.referenced {
                _ = states[slot].compareExchange(
                    expected: state, desired: Self.whole, ordering: .relaxed)
            }
            return false
        }
        return states[slot].compareExchange(
            expected: state, desired: Self.exclusive, ordering: .acquiring
        ).exchanged
    }

    /// Makes an exclusive slot whole, with one pin, which is the caller's.  It counts as not used
    /// of late: what one large read passes through goes before what is read again.
    borrowing func publish(_ slot: Int) {
        states[slot].store(Self.whole | 1, ordering: .releasing)
    }

    /// Makes an exclusive slot empty.
    borrowing func abandon(_ slot: Int) {
        setWords(.none, of: slot)
        states[slot].store(0, ordering: .releasing)
    }
}
