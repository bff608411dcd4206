internal import Glibc

/// Finds where a cluster's bytes stood before: chains of the positions with the same hash of four
/// bytes, and the last position with the same hash of three.
///
/// Positions are kept modulo 64 KiB.  What an entry leads to is compared byte by byte, so that one
/// of another round costs a comparison, never a wrong match.
struct MatchFinder: ~Copyable {
    /// Bytes that stood `distance` bytes before, too; none where that is 0.
    struct Match {
        var length = 0
        var distance = 0
    }

    /// How far back a match may lie, in bytes: the format's limit.
    static var windowSize: Int { 4096 }
    /// How many bytes from a position on a finder looks at.
    static var wordSize: Int { 4 }

    private static var shortBits: UInt32 { 12 }
    private static var longBits: UInt32 { 14 }

    /// The last position for each hash of three bytes, and of four.
    private let short: UnsafeMutablePointer<UInt16>
    private let long: UnsafeMutablePointer<UInt16>
    /// For each position in the window, the one before it with the same hash of four bytes.
    private let chain: UnsafeMutablePointer<UInt16>
    /// How far back a match of three bytes may lie.
    private var farthestShort = 0

    init() {
        short = .allocate(capacity: 1 &<< Int(Self.shortBits))
        long = .allocate(capacity: 1 &<< Int(Self.longBits))
        chain = .allocate(capacity: Self.windowSize)
    }

    deinit {
        short.deallocate()
        long.deallocate()
        chain.deallocate()
    }

    /// Forgets everything, so that a stream depends on its cluster alone.
    ///
    /// - Parameters:
    ///   - literalBits: how many bits a literal takes, about.
    ///   - shortMatchBits: how many a match of three bytes takes, and one more where it is twice as
    ///     far: from some distance on, three literals are shorter.
    mutating func reset(literalBits: Float, shortMatchBits: Float) {
        farthestShort = Int(exp2f(min(max(3 * literalBits - shortMatchBits, 0), 12)))
        short.initialize(repeating: 0, count: 1 &<< Int(Self.shortBits))
        long.initialize(repeating: 0, count: 1 &<< Int(Self.longBits))
        chain.initialize(repeating: 0, count: Self.windowSize)
    }

    /// Remembers the positions, each with a word before the cluster's end.
    @inline(__always)
    func insert(_ cluster: UnsafeRawPointer, _ positions: Range<Int>) {
        var position = positions.lowerBound
        while position < positions.upperBound {
            _ = remember(position, Self.word(cluster + position))
            position &+= 1
        }
    }

    /// The longest match for `position`, if one is longer than `shortest`; it is remembered.
    ///
    /// There is a word before the cluster's `end`.  After so many attempts, or a match of `enough`
    /// bytes, it looks no further.
    @inline(__always)
    func longest(
        _ cluster: UnsafeRawPointer, _ position: Int, end: Int, longerThan shortest: Int,
        attempts: Int, enough: Int
    ) -> Match {
        let here = cluster + position
        let word = Self.word(here)
        var (candidate, shortCandidate) = remember(position, word)
        let farthest = min(Self.windowSize, position)
        let most = min(DeflateSymbols.longestMatch, end &- position)

        var match = Match()
        if shortest < 3 {
            let distance = Self.distance(position, shortCandidate)
            if distance > 0, distance <= min(farthest, farthestShort),
                Self.threeBytes(Self.word(here - distance)) == Self.threeBytes(word)
            {
                match = Match(length: 3, distance: distance)
            }
        }
        // From here on four bytes are the same, at least.
        var best = max(shortest, 3)
        var last = 0
        for _ in 0..<attempts where best < most {
            let distance = Self.distance(position, candidate)
            guard distance > last, distance <= farthest else { break }
            last = distance
            let there = here - distance
            // Only one whose last byte is the same, too, can be longer.
            if Self.word(there + (best &- 3)) == Self.word(here + (best &- 3)),
                Self.word(there) == word
            {
                let length = Self.commonLength(here, there, most)
                if length > best {
                    best = length
                    match = Match(length: length, distance: distance)
                    if length >= enough { break }
                }
            }
            candidate = chain[Int(candidate) & (Self.windowSize &- 1)]
        }
        return match
    }

    /// Puts the position first in its chains, and returns which were: of four bytes, of three.
    @inline(__always)
    private func remember(_ position: Int, _ word: UInt32) -> (long: UInt16, short: UInt16) {
        let entry = UInt16(truncatingIfNeeded: position)
        let longHash = Self.hash(word, Self.longBits)
        let shortHash = Self.hash(Self.threeBytes(word), Self.shortBits)
        let before = (long[longHash], short[shortHash])
        chain[position & (Self.windowSize &- 1)] = before.0
        long[longHash] = entry
        short[shortHash] = entry
        return before
    }

    @inline(__always)
    private static func word(_ bytes: UnsafeRawPointer) -> UInt32 {
        UInt32(littleEndian: bytes.loadUnaligned(as: UInt32.self))
    }

    /// The first three of a word's bytes.
    @inline(__always)
    private static func threeBytes(_ word: UInt32) -> UInt32 { word &<< 8 }

    @inline(__always)
    private static func hash(_ value: UInt32, _ bits: UInt32) -> Int {
        Int(truncatingIfNeeded: (value &* 0x9E37_79B1) &>> (32 &- bits))
    }

    /// How far an entry lies before a position, unless it is of another round.
    @inline(__always)
    private static func distance(_ position: Int, _ entry: UInt16) -> Int {
        Int(UInt16(truncatingIfNeeded: position) &- entry)
    }

    /// How many bytes are the same, up to `most`; the first four are.
    @inline(__always)
    private static func commonLength(
        _ a: UnsafeRawPointer, _ b: UnsafeRawPointer, _ most: Int
    ) -> Int {
        var length = 4
        while length &+ 8 <= most {
            let difference =
                (a + length).loadUnaligned(as: UInt64.self)
                ^ (b + length).loadUnaligned(as: UInt64.self)
            if difference != 0 {
                return length &+ difference.littleEndian.trailingZeroBitCount &>> 3
            }
            length &+= 8
        }
        while length < most,
            (a + length).load(as: UInt8.self) == (b + length).load(as: UInt8.self)
        {
            length &+= 1
        }
        return length
    }
}
