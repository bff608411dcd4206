/// A code for each symbol of an alphabet, the frequent ones short (RFC 1951, section 3.2.2).
struct PrefixCode: ~Copyable {
    /// How many bits each symbol's code has; 0 for one that does not occur.
    let lengths: UnsafeMutablePointer<UInt8>
    /// The codes as they are written: the first bit is the lowest.
    let codes: UnsafeMutablePointer<UInt16>

    private let symbolCount: Int
    private let longest: Int
    /// The symbols that occur, the rare ones first: how often, then 9 bits for which.
    private let sorted: UnsafeMutablePointer<UInt32>
    /// Huffman's tree: weights, then parents, then depths.
    private let nodes: UnsafeMutablePointer<UInt32>
    /// How many codes there are of each length.
    private let counts: UnsafeMutablePointer<Int>

    private static var mostDepth: Int { 32 }

    /// A code of at most `longest` bits for at most 512 symbols, of which at least two occur.
    init(symbolCount: Int, longest: Int) {
        self.symbolCount = symbolCount
        self.longest = longest
        lengths = .allocate(capacity: symbolCount)
        codes = .allocate(capacity: symbolCount)
        sorted = .allocate(capacity: symbolCount)
        nodes = .allocate(capacity: symbolCount)
        counts = .allocate(capacity: Self.mostDepth + 1)
        lengths.initialize(repeating: 0, count: symbolCount)
        codes.initialize(repeating: 0, count: symbolCount)
    }

    deinit {
        lengths.deallocate()
        codes.deallocate()
        sorted.deallocate()
        nodes.deallocate()
        counts.deallocate()
    }

    /// Makes the best code for symbols that occur so often, less than 2^22 times all in all.
    ///
    /// At least two symbols get one, so that it is complete: some decoders want that.
    func make(_ frequencies: UnsafePointer<UInt32>) {
        let used = sort(frequencies)
        counts.initialize(repeating: 0, count: Self.mostDepth + 1)
        findDepths(used)
        limitDepths()
        assignLengths()
        assignCodes()
    }

    /// Makes the code whose lengths are known.
    func make(_ length: (Int) -> Int) {
        counts.initialize(repeating: 0, count: Self.mostDepth + 1)
        for symbol in 0..<symbolCount {
            lengths[symbol] = UInt8(truncatingIfNeeded: length(symbol))
            counts[length(symbol)] &+= 1
        }
        assignCodes()
    }

    /// Returns how many symbols occur; two at least.
    private func sort(_ frequencies: UnsafePointer<UInt32>) -> Int {
        var used = 0
        for symbol in 0..<symbolCount where frequencies[symbol] != 0 {
            sorted[used] = frequencies[symbol] &<< 9 | UInt32(truncatingIfNeeded: symbol)
            used &+= 1
        }
        for symbol in 0..<2 where used < 2 && frequencies[symbol] == 0 {
            sorted[used] = 1 &<< 9 | UInt32(truncatingIfNeeded: symbol)
            used &+= 1
        }
        // Shell's way: next to nothing to write down, and no memory.
        var gap = 64
        while gap > 0 {
            for index in stride(from: gap, to: used, by: 1) {
                let item = sorted[index]
                var place = index
                while place >= gap, sorted[place &- gap] > item {
                    sorted[place] = sorted[place &- gap]
                    place &-= gap
                }
                sorted[place] = item
            }
            gap = gap == 1 ? 0 : (gap &* 3 &+ 4) / 8
        }
        return used
    }

    /// Counts the codes of each depth in Huffman's tree, which is made in place (Moffat and
    /// Katajainen, "In-place calculation of minimum-redundancy codes", 1995).
    private func findDepths(_ used: Int) {
        for index in 0..<used { nodes[index] = sorted[index] &>> 9 }
        // The two lightest of the leaves and of the trees so far make the next tree, again and
        // again; a tree's place takes its parent's index when it is used.
        var leaf = 0
        var tree = 0
        for next in 0..<(used &- 1) {
            var weight: UInt32 = 0
            for _ in 0..<2 {
                if leaf >= used || (tree < next && nodes[tree] < nodes[leaf]) {
                    weight &+= nodes[tree]
                    nodes[tree] = UInt32(truncatingIfNeeded: next)
                    tree &+= 1
                } else {
                    weight &+= nodes[leaf]
                    leaf &+= 1
                }
            }
            nodes[next] = weight
        }
        // Parents become depths, from the root on.
        var inner = used &- 2
        nodes[inner] = 0
        for node in stride(from: inner &- 1, through: 0, by: -1) {
            nodes[node] = nodes[Int(nodes[node])] &+ 1
        }
        // Of the places at each depth, those that are no inner nodes are leaves.
        var places = 1
        var depth = 0
        while places > 0 {
            var parents = 0
            while inner >= 0, nodes[inner] == depth {
                parents &+= 1
                inner &-= 1
            }
            counts[depth] &+= places &- parents
            places = parents &* 2
            depth &+= 1
        }
    }

    /// Cuts codes that are too long, and lengthens others for it.
    private func limitDepths() {
        for depth in (longest &+ 1)...Self.mostDepth {
            counts[longest] &+= counts[depth]
            counts[depth] = 0
        }
        // How much is taken of the room that codes of the longest kind have.
        var taken = 0
        for length in 1...longest { taken &+= counts[length] &<< (longest &- length) }
        while taken > 1 &<< longest {
            // A code that grows by a bit leaves room beside it for one of the longest.
            var length = longest &- 1
            while counts[length] == 0 { length &-= 1 }
            counts[length] &-= 1
            counts[length &+ 1] &+= 2
            counts[longest] &-= 1
            taken &-= 1
        }
    }

    private func assignLengths() {
        lengths.update(repeating: 0, count: symbolCount)
        var rank = 0
        for length in stride(from: longest, to: 0, by: -1) {
            for _ in 0..<counts[length] {
                lengths[Int(sorted[rank] & 511)] = UInt8(truncatingIfNeeded: length)
                rank &+= 1
            }
        }
    }

    /// Numbers the codes of each length in the order of their symbols.
    private func assignCodes() {
        // Counts become the next code of their length.
        var code = 0
        for length in 1...longest {
            let count = counts[length]
            counts[length] = code
            code = (code &+ count) &<< 1
        }
        for symbol in 0..<symbolCount where lengths[symbol] != 0 {
            let length = Int(lengths[symbol])
            codes[symbol] = Self.reversed(counts[length], length)
            counts[length] &+= 1
        }
    }

    private static func reversed(_ code: Int, _ length: Int) -> UInt16 {
        var code = code
        var result = 0
        for _ in 0..<length {
            result = result &<< 1 | code & 1
            code &>>= 1
        }
        return UInt16(truncatingIfNeeded: result)
    }
}
