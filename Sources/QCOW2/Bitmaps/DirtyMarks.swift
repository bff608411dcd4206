internal import Glibc
internal import Synchronization

/// Which granules of a disk are marked, in chunks that are made when they are first needed.
///
/// Marking takes no lock and may happen on any thread; a granule that is marked already costs a
/// look.  What is marked stays so.
struct DirtyMarks: ~Copyable, @unchecked Sendable {
    // `@unchecked`: all that is reached from here is atomic.

    /// Marks of a chunk, 4 KiB, as a power of two.
    private static let chunkBits: UInt64 = 15
    private static let wordsPerChunk = 1 << 9
    /// What stands for a chunk in which every granule is marked.
    private static let whole: UInt64 = 1

    /// Bytes of a granule, as a power of two.
    let granularityBits: UInt64
    /// Per chunk: 0 where nothing is marked, `whole`, or the address of its words.
    private let chunks: AtomicArray

    init(granularityBits: UInt8) throws(ImageError) {
        self.granularityBits = UInt64(granularityBits)
        chunks = try AtomicArray(
            count: Int((Limits.bitmapByteCount &* 8) &>> DirtyMarks.chunkBits),
            for: "what dirty bitmaps record")
    }

    deinit {
        for index in 0..<chunks.count { free(Self.words(chunks[index].load(ordering: .relaxed))) }
    }

    private static func words(_ chunk: UInt64) -> UnsafeMutablePointer<Atomic<UInt64>>? {
        chunk <= whole ? nil : UnsafeMutablePointer(bitPattern: UInt(chunk))
    }

    // MARK: Marking

    /// Marks every granule that bytes `offset ..< offset + byteCount` touch; there is one at least,
    /// and the disk is no larger than a bitmap may describe.
    @inline(__always)
    borrowing func mark(_ offset: UInt64, _ byteCount: UInt64) {
        let first = offset &>> granularityBits
        let last = (offset &+ byteCount &- 1) &>> granularityBits
        if first == last, isMarked(first) { return }
        markMissing(first, last)
    }

    @inline(__always)
    private borrowing func isMarked(_ granule: UInt64) -> Bool {
        let chunk = chunks[Int(truncatingIfNeeded: granule &>> Self.chunkBits)]
            .load(ordering: .acquiring)  // pairs with the exchange in `mark(_:inChunk:)`
        guard let words = Self.words(chunk) else { return chunk == Self.whole }
        let word = Int(truncatingIfNeeded: granule &>> 6) & (Self.wordsPerChunk &- 1)
        return words[word].load(ordering: .relaxed) &>> (granule & 63) & 1 != 0
    }

    @inline(never)
    private borrowing func markMissing(_ first: UInt64, _ last: UInt64) {
        var granule = first
        while granule <= last {
            let chunkEnd = (granule &>> Self.chunkBits &+ 1) &<< Self.chunkBits
            mark(granule..<min(chunkEnd, last &+ 1))
            granule = chunkEnd
        }
    }

    /// Marks granules of one chunk.
    private borrowing func mark(_ granules: Range<UInt64>) {
        let index = Int(truncatingIfNeeded: granules.lowerBound &>> Self.chunkBits)
        var chunk = chunks[index].load(ordering: .acquiring)
        if chunk == 0 {
            let isWhole = granules.count == 1 << Int(Self.chunkBits)
            // Where memory is missing too much is marked, never too little.
            let made = isWhole ? Self.whole : Self.emptyChunk() ?? Self.whole
            let (exchanged, found) = chunks[index].compareExchange(
                expected: 0, desired: made, ordering: .acquiringAndReleasing)
            if !exchanged { free(Self.words(made)) }
            chunk = exchanged ? made : found
        }
        guard let words = Self.words(chunk) else { return }
        Self.forEachWord(of: granules) { word, mask in
            let place = Int(truncatingIfNeeded: word) & (Self.wordsPerChunk &- 1)
            if words[place].load(ordering: .relaxed) & mask != mask {
                words[place].bitwiseOr(mask, ordering: .relaxed)
            }
        }
    }

    private static func emptyChunk() -> UInt64? {
        calloc(wordsPerChunk, 8).map { UInt64(UInt(bitPattern: $0)) }
    }

    /// Calls `body` with each word of 64 granules that `granules` touches, and which of them.
    private static func forEachWord(
        of granules: Range<UInt64>, _ body: (_ word: UInt64, _ mask: UInt64) -> Void
    ) {
        var granule = granules.lowerBound
        while granule < granules.upperBound {
            let end = min((granule &>> 6 &+ 1) &<< 6, granules.upperBound)
            let ones = end &- granule == 64 ? UInt64.max : 1 &<< (end &- granule) &- 1
            body(granule &>> 6, ones &<< (granule & 63))
            granule = end
        }
    }

    // MARK: Looking at the marks

    /// Whether none of `granules` is marked.
    borrowing func isEmpty(_ granules: Range<UInt64>) -> Bool {
        var granule = granules.lowerBound
        while granule < granules.upperBound {
            let chunkEnd = (granule &>> Self.chunkBits &+ 1) &<< Self.chunkBits
            let part = granule..<min(chunkEnd, granules.upperBound)
            if !isEmptyInChunk(part) { return false }
            granule = chunkEnd
        }
        return true
    }

    private borrowing func isEmptyInChunk(_ granules: Range<UInt64>) -> Bool {
        let index = Int(truncatingIfNeeded: granules.lowerBound &>> Self.chunkBits)
        let chunk = chunks[index].load(ordering: .acquiring)
        guard let words = Self.words(chunk) else { return chunk != Self.whole }
        var isEmpty = true
        Self.forEachWord(of: granules) { word, mask in
            let place = Int(truncatingIfNeeded: word) & (Self.wordsPerChunk &- 1)
            if words[place].load(ordering: .relaxed) & mask != 0 { isEmpty = false }
        }
        return isEmpty
    }

    /// Adds the marks of `granules`, of which the first is a multiple of 64, to the bits of
    /// `bytes`, as a bitmap's data has them: the lowest bit of a byte comes first.
    borrowing func add(_ granules: Range<UInt64>, to bytes: UnsafeMutableRawBufferPointer) {
        let base = granules.lowerBound &>> 6
        Self.forEachWord(of: granules) { word, mask in
            let chunk = chunks[Int(truncatingIfNeeded: (word &<< 6) &>> Self.chunkBits)]
                .load(ordering: .acquiring)
            let place = Int(truncatingIfNeeded: word) & (Self.wordsPerChunk &- 1)
            let marked =
                Self.words(chunk)?[place].load(ordering: .relaxed)
                ?? (chunk == Self.whole ? .max : 0)
            guard marked & mask != 0 else { return }
            let position = Int(truncatingIfNeeded: word &- base) &* 8
            let old = UInt64(
                littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: UInt64.self))
            bytes.storeBytes(
                of: (old | marked & mask).littleEndian, toByteOffset: position, as: UInt64.self)
        }
    }
}
