import QCOW2
import Synchronization
import TestSupport
import Testing

/// Where slices of L2 tables are kept, and which one leaves for another.
@Suite("The cache of L2 tables")
struct SliceCacheTests {
    @Test("Slots come in sets of eight, a power of two of them, two at least")
    func sizes() throws {
        for (slices, slots) in [(0, 16), (31, 16), (32, 32), (63, 32), (64, 64), (65, 64)] {
            for wordBits in [6, 9] {
                let cache = try Cache(
                    wordBits: wordBits, entryWordBits: 0, byteCount: slices << (wordBits + 3))
                #expect(cache.slotCount == slots, "\(slices)")
            }
        }
    }

    @Test("A slice is found where it was put, with its words, until it is cleared")
    func finding() throws {
        let cache = try Cache(wordBits: 3, entryWordBits: 0, byteCount: 0)
        #expect(cache.slot(of: 0) == nil && cache.slot(of: 5) == nil)
        let slot = try #require(cache.victim(for: 5) { _ in true })
        #expect(cache.slice(in: slot) == nil)
        cache.fill(slot, 5, from: 100)
        #expect(cache.slot(of: 5) == slot && cache.version(of: 5) == 2)
        #expect(cache.slice(in: slot) == 5 && cache.slot(of: 4) == nil && cache.slot(of: 6) == nil)
        #expect(cache.isUnchanged(slot, 2))
        #expect(cache.words(of: slot) == Array(100..<108))
        #expect((0..<8).map { cache.entry(in: slot, at: $0).bits } == Array(100..<108))
        // One word changes in one step: what was read beside it belongs together.
        cache.store(L2Entry(bits: 7), in: slot, at: 3)
        #expect(cache.entry(in: slot, at: 3) == L2Entry(bits: 7))
        #expect(
            cache.entry(in: slot, at: 2).bits == 102 && cache.entry(in: slot, at: 4).bits == 104)
        #expect(cache.isUnchanged(slot, 2))
        cache.fill(slot, 5, from: 200)
        #expect(!cache.isUnchanged(slot, 2))
        #expect(cache.version(of: 5) == 4)
        cache.clear(slot)
        #expect(cache.slot(of: 5) == nil && cache.slice(in: slot) == nil)
        #expect(!cache.isUnchanged(slot, 4))
    }

    @Test("Both words of an extended entry change together, or a reader looks again")
    func extended() throws {
        let cache = try Cache(wordBits: 3, entryWordBits: 1, byteCount: 0)
        let slot = try #require(cache.victim(for: 9) { _ in true })
        cache.fill(slot, 9, from: 50)
        for index in 0..<4 {
            let entry = cache.entry(in: slot, at: index)
            #expect(entry.bits == UInt64(50 + index * 2))
            #expect(entry.subclusters.bits == UInt64(51 + index * 2))
        }
        let version = try #require(cache.version(of: 9))
        let new = L2Entry(bits: 1, subclusters: SubclusterBitmap(bits: 2))
        cache.store(new, in: slot, at: 2)
        #expect(cache.entry(in: slot, at: 2) == new)
        #expect(cache.entry(in: slot, at: 1).subclusters.bits == 53)
        #expect(cache.entry(in: slot, at: 3).bits == 56)
        #expect(!cache.isUnchanged(slot, version))
        #expect(cache.version(of: 9) == version + 2)
    }

    @Test("An empty slot goes first, then one that was not used lately, then the slice's own way")
    func victims() throws {
        let cache = try Cache(wordBits: 0, entryWordBits: 0, byteCount: 0)
        let all: (Int) -> Bool = { _ in true }
        // Slices of one set.
        var slices: [UInt64] = []
        for slice in 0..<1000 as Range<UInt64>
        where try #require(cache.victim(for: slice, isFree: all)) < 8 { slices.append(slice) }
        #expect(slices.count > 400 && slices.count < 600)
        for slot in 0..<8 {
            #expect(cache.victim(for: slices[slot], isFree: all) == slot)
            cache.fill(slot, slices[slot])
        }
        #expect((0..<8).allSatisfy { cache.slot(of: slices[$0]) == $0 })
        #expect(cache.victim(for: slices[8]) { _ in false } == nil)
        // All were used: the next victims are told by the slice, and nothing counts as used.
        let way = Int(slices[8] & 7)
        #expect(cache.victim(for: slices[8], isFree: all) == way)
        #expect(cache.victim(for: slices[8], isFree: all) == 7)
        for used in [7, 6, 4] { _ = cache.slot(of: slices[used]) }
        #expect(cache.victim(for: slices[8], isFree: all) == 5)
        #expect(cache.victim(for: slices[8]) { $0 != 5 && $0 != 3 } == 2)
        #expect(cache.victim(for: slices[8]) { $0 == 6 } == 6)
        cache.clear(4)
        #expect(cache.victim(for: slices[8], isFree: all) == 4)
        #expect(cache.victim(for: slices[8]) { $0 != 4 } == 6)
    }

    @Test("Of the ways that may be had, the slice's own or the next one behind it")
    func ways() throws {
        let cache = try Cache(wordBits: 0, entryWordBits: 0, byteCount: 0)
        var slices: [UInt64] = []
        for slice in 0..<100 as Range<UInt64> {
            let slot = try #require(cache.victim(for: slice) { _ in true })
            if slot >= 8 { slices.append(slice) }
        }
        for way in 0..<8 {
            for slot in 0..<8 { cache.fill(8 + slot, slices[slot]) }
            let slice = try #require(slices.dropFirst(8).first { Int($0 & 7) == way })
            let taken = 8 + way
            #expect(cache.victim(for: slice) { $0 != taken } == 8 + (way + 1) % 8)
        }
    }
}

/// The cache at a fixed address.
private final class Cache {
    private let cache: SliceCache

    init(wordBits: Int, entryWordBits: Int, byteCount: Int) throws {
        cache = try SliceCache(
            wordBits: wordBits, entryWordBits: entryWordBits, byteCount: byteCount)
    }

    var slotCount: Int { cache.slotCount }
    func slot(of slice: UInt64) -> Int? { cache.find(slice)?.slot }
    func version(of slice: UInt64) -> UInt64? { cache.find(slice)?.version }
    func slice(in slot: Int) -> UInt64? { cache.slice(in: slot) }
    func isUnchanged(_ slot: Int, _ version: UInt64) -> Bool { cache.isUnchanged(slot, version) }
    func entry(in slot: Int, at index: Int) -> L2Entry { cache.entry(in: slot, at: index) }
    func store(_ entry: L2Entry, in slot: Int, at index: Int) {
        cache.store(entry, in: slot, at: index)
    }
    func clear(_ slot: Int) { cache.clear(slot) }
    func victim(for slice: UInt64, isFree: (Int) -> Bool) -> Int? {
        cache.victim(for: slice, isFree: isFree)
    }
    func words(of slot: Int) -> [UInt64] {
        let words = cache.words(of: slot)
        return (0..<1 << cache.wordBits).map { words[$0].load(ordering: .relaxed) }
    }

    /// Fills a slot with a slice of big-endian numbers from `first` up.
    func fill(_ slot: Int, _ slice: UInt64, from first: UInt64 = 0) {
        var bytes: [UInt8] = []
        for word in 0..<(1 << cache.wordBits) { bytes.put(first + UInt64(word), at: word * 8) }
        bytes.withUnsafeBytes { cache.fill(slot, with: slice, from: $0) }
    }
}
