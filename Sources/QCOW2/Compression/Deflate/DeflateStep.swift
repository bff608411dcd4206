/// Some literals, then perhaps a match: what a deflate stream goes on with.
struct DeflateStep {
    private let word: UInt32

    static var mostLiterals: Int { 2047 }

    /// At most `mostLiterals` literals; a match of no bytes is none.
    @inline(__always)
    init(literals: Int, _ match: MatchFinder.Match) {
        let distance = (match.distance &- 1) & (MatchFinder.windowSize &- 1)
        word = UInt32(truncatingIfNeeded: literals &<< 21 | distance &<< 9 | match.length)
    }

    @inline(__always) var literals: Int { Int(word &>> 21) }
    @inline(__always) var length: Int { Int(word & 511) }
    @inline(__always) var distance: Int { Int(word &>> 9) & (MatchFinder.windowSize &- 1) &+ 1 }
}
