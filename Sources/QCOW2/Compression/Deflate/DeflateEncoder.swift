/// Makes raw deflate streams (RFC 1951) whose distances stay within the 4 KiB that the format
/// allows.
///
/// It is ours because no library has such a window and is quick: libdeflate's cannot be made
/// smaller, and zlib takes three times as long for streams that are no shorter.
struct DeflateEncoder: ~Copyable {
    /// Where the search for matches ends.
    private struct Patience {
        /// How many places are looked at, and how many where there is a match already.
        let attempts: Int
        let furtherAttempts: Int
        /// A match of so many bytes is taken without a look for a longer one.
        let enough: Int
        /// How many bits a match of three bytes is said to take where it is as near as can be.
        let shortMatchBits: Float

        init(_ effort: CompressionEffort) {
            switch effort {
            case .usual:
                // More of each gains less than a thousandth, in text that repeats itself too.
                (attempts, furtherAttempts, enough, shortMatchBits) = (96, 32, 128, 7)
            case .low:
                (attempts, furtherAttempts, enough, shortMatchBits) = (12, 6, 32, 9)
            }
        }
    }

    private var finder = MatchFinder()
    private var blocks = DeflateBlocks()

    private init() {}

    /// The address of a new context.
    static func make() -> UnsafeMutableRawPointer {
        let context = UnsafeMutablePointer<DeflateEncoder>.allocate(capacity: 1)
        context.initialize(to: DeflateEncoder())
        return UnsafeMutableRawPointer(context)
    }

    static func destroy(_ address: UnsafeMutableRawPointer) {
        let context = address.assumingMemoryBound(to: DeflateEncoder.self)
        context.deinitialize(count: 1)
        context.deallocate()
    }

    /// How many bytes of `room` the stream took; nil where it does not fit.
    static func compress(
        _ cluster: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer,
        effort: CompressionEffort, with address: UnsafeMutableRawPointer
    ) -> Int? {
        guard !cluster.isEmpty, !room.isEmpty else { return nil }
        return address.assumingMemoryBound(to: DeflateEncoder.self).pointee
            .compress(
                cluster.baseAddress.unsafelyUnwrapped, cluster.count, into: room, Patience(effort))
    }

    private mutating func compress(
        _ cluster: UnsafeRawPointer, _ end: Int, into room: UnsafeMutableRawBufferPointer,
        _ patience: Patience
    ) -> Int? {
        blocks.begin(cluster, room)
        finder.reset(
            literalBits: blocks.literalBits(cluster, end), shortMatchBits: patience.shortMatchBits)
        // Behind it there is no word to look for.
        let last = end &- MatchFinder.wordSize
        var literals = 0
        var position = 0
        while position <= last {
            var match = finder.longest(
                cluster, position, end: end, longerThan: DeflateSymbols.shortestMatch &- 1,
                attempts: patience.attempts, enough: patience.enough)
            var known = position &+ 1
            // A literal and a better match behind it may be shorter than this one.
            while match.distance > 0, match.length < patience.enough, known <= last {
                let next = finder.longest(
                    cluster, known, end: end, longerThan: match.length &- 1,
                    attempts: patience.furtherAttempts, enough: patience.enough)
                known &+= 1
                guard Self.gain(of: next, over: match) > 2 else { break }
                match = next
                literals &+= 1
                position &+= 1
            }
            if match.distance == 0 {
                literals &+= 1
                position &+= 1
                if literals < DeflateStep.mostLiterals { continue }
            }
            guard add(&literals, match) else { return nil }
            position &+= match.length
            let stop = min(position, last &+ 1)
            if known < stop { finder.insert(cluster, known..<stop) }
        }
        literals &+= end &- position
        guard literals == 0 || add(&literals, MatchFinder.Match()) else { return nil }
        return blocks.end()
    }

    /// Hands on the literals, in pieces that a step can tell, and the match.
    @inline(__always)
    private mutating func add(_ literals: inout Int, _ match: MatchFinder.Match) -> Bool {
        while literals > DeflateStep.mostLiterals {
            guard blocks.add(literals: DeflateStep.mostLiterals, MatchFinder.Match()) else {
                return false
            }
            literals &-= DeflateStep.mostLiterals
        }
        let isAdded = blocks.add(literals: literals, match)
        literals = 0
        return isAdded
    }

    /// Roughly how much is gained, in quarters of a byte.
    @inline(__always)
    private static func gain(of next: MatchFinder.Match, over match: MatchFinder.Match) -> Int {
        guard next.distance > 0 else { return 0 }
        return 4 &* (next.length &- match.length)
            &+ next.distance.leadingZeroBitCount &- match.distance.leadingZeroBitCount
    }
}
