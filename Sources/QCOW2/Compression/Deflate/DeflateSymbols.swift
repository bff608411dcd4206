/// How lengths and distances are told in a deflate stream: a symbol, then further bits of the value
/// (RFC 1951, section 3.2.5).
enum DeflateSymbols {
    /// How many symbols literals, a block's end and lengths have; the last two never occur.
    static var literalCount: Int { 288 }
    static var distanceCount: Int { 30 }

    static var endOfBlock: Int { 256 }
    static var firstLength: Int { 257 }

    static var shortestMatch: Int { 3 }
    static var longestMatch: Int { 258 }

    /// The symbol of a length of 3 to 258 bytes.
    @inline(__always)
    static func length(_ length: Int) -> Int {
        if length == longestMatch { return 285 }
        let value = UInt32(truncatingIfNeeded: length &- shortestMatch)
        if value < 8 { return firstLength &+ Int(value) }
        let bits = 29 &- value.leadingZeroBitCount
        return firstLength &+ 4 &+ bits &* 4 &+ Int(value &>> UInt32(bits) & 3)
    }

    /// How many bits follow a symbol of literals and lengths.
    static func extraBits(_ symbol: Int) -> Int {
        symbol < 265 || symbol == 285 ? 0 : (symbol &- firstLength) &>> 2 &- 1
    }

    /// The symbol of a distance in bytes.
    @inline(__always)
    static func distance(_ distance: Int) -> Int {
        let value = UInt32(truncatingIfNeeded: distance &- 1)
        if value < 4 { return Int(value) }
        let bits = 30 &- value.leadingZeroBitCount
        return bits &* 2 &+ 2 &+ Int(value &>> UInt32(bits) & 1)
    }

    /// How many bits follow a distance's symbol.
    @inline(__always)
    static func extraBits(distance symbol: Int) -> Int { symbol < 4 ? 0 : symbol &>> 1 &- 1 }

    /// How many bits a symbol of literals and lengths has in the fixed code (section 3.2.6).
    static func fixedLength(_ symbol: Int) -> Int {
        switch symbol {
        case ..<144: 8
        case ..<256: 9
        case ..<280: 7
        default: 8
        }
    }

    static var fixedDistanceLength: Int { 5 }
}
