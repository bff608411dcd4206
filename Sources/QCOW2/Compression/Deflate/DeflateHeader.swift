/// A block's own codes, told by their lengths, which are coded themselves (RFC 1951, section
/// 3.2.7).
struct DeflateHeader: ~Copyable {
    private let code = PrefixCode(symbolCount: 19, longest: 7)
    private let frequencies: UnsafeMutablePointer<UInt32>
    /// A length, or a run's symbol, in the low five bits; above it how many more there are.
    private let items: UnsafeMutablePointer<UInt16>
    private let counts: UnsafeMutablePointer<Counts>

    private struct Counts {
        var literals = 0
        var distances = 0
        var items = 0
        var lengths = 0
        var bits = 0
    }

    private enum Run {
        static var previous: Int { 16 }
        static var shortZero: Int { 17 }
        static var longZero: Int { 18 }

        static func extraBits(_ symbol: Int) -> Int {
            switch symbol {
            case previous: 2
            case shortZero: 3
            case longZero: 7
            default: 0
            }
        }
    }

    init() {
        frequencies = .allocate(capacity: 19)
        items = .allocate(capacity: DeflateSymbols.literalCount + DeflateSymbols.distanceCount)
        counts = .allocate(capacity: 1)
        counts.initialize(to: Counts())
    }

    deinit {
        frequencies.deallocate()
        items.deallocate()
        counts.deallocate()
    }

    /// How many bits the header takes.
    var bitCount: Int { counts.pointee.bits }

    /// Makes the header for these codes.
    func make(_ literals: borrowing PrefixCode, _ distances: borrowing PrefixCode) {
        var counts = Counts()
        counts.literals = Self.usedCount(DeflateSymbols.literalCount, least: 257) {
            literals.lengths[$0] != 0
        }
        counts.distances = Self.usedCount(DeflateSymbols.distanceCount, least: 1) {
            distances.lengths[$0] != 0
        }
        frequencies.initialize(repeating: 0, count: 19)
        // Runs go on from one code to the other.
        let total = counts.literals &+ counts.distances
        var index = 0
        func length(_ index: Int) -> UInt8 {
            index < counts.literals
                ? literals.lengths[index] : distances.lengths[index &- counts.literals]
        }
        while index < total {
            let value = length(index)
            var run = 1
            while index &+ run < total, length(index &+ run) == value { run &+= 1 }
            addRun(Int(value), run, &counts)
            index &+= run
        }
        code.make(frequencies)
        counts.lengths = Self.usedCount(19, least: 4) { code.lengths[Self.place($0)] != 0 }
        counts.bits &+= 14 &+ 3 &* counts.lengths
        for symbol in 0..<19 {
            counts.bits &+=
                Int(frequencies[symbol])
                &* (Int(code.lengths[symbol]) &+ Run.extraBits(symbol))
        }
        self.counts.pointee = counts
    }

    /// How many places there are up to the last that is used.
    private static func usedCount(_ count: Int, least: Int, _ isUsed: (Int) -> Bool) -> Int {
        var used = count
        while used > least, !isUsed(used &- 1) { used &-= 1 }
        return used
    }

    /// Adds a length that stands `count` times.
    private func addRun(_ length: Int, _ count: Int, _ counts: inout Counts) {
        var rest = count
        func add(_ symbol: Int, _ extra: Int = 0) {
            items[counts.items] = UInt16(truncatingIfNeeded: extra &<< 5 | symbol)
            counts.items &+= 1
            frequencies[symbol] &+= 1
        }
        if length == 0 {
            while rest >= 11 {
                let run = min(rest, 138)
                add(Run.longZero, run &- 11)
                rest &-= run
            }
            if rest >= 3 {
                add(Run.shortZero, rest &- 3)
                rest = 0
            }
        } else {
            add(length)
            rest &-= 1
            while rest >= 3 {
                let run = min(rest, 6)
                add(Run.previous, run &- 3)
                rest &-= run
            }
        }
        for _ in 0..<rest { add(length) }
    }

    /// Which length, or run, stands at a place of the header (A for 0): the rare ones come last.
    private static func place(_ index: Int) -> Int {
        let order: StaticString = "QRSAIHJGKFLEMDNCOBP"
        return Int(order.utf8Start[index]) &- 65
    }

    /// Writes what `make` has made.
    func write(to output: inout BitWriter) {
        let counts = counts.pointee
        output.add(UInt64(counts.literals &- 257), 5)
        output.add(UInt64(counts.distances &- 1), 5)
        output.add(UInt64(counts.lengths &- 4), 4)
        output.flush()
        for index in 0..<counts.lengths {
            output.add(UInt64(code.lengths[Self.place(index)]), 3)
            output.flush()
        }
        for item in UnsafeBufferPointer(start: items, count: counts.items) {
            let symbol = Int(item & 31)
            output.add(UInt64(code.codes[symbol]), UInt64(code.lengths[symbol]))
            output.add(UInt64(item &>> 5), UInt64(Run.extraBits(symbol)))
            output.flush()
        }
    }
}
