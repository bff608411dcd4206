/// Writes blocks of a deflate stream, each in the shortest of the three ways (RFC 1951, section
/// 3.2.3).
struct DeflateBlockWriter: ~Copyable {
    // A literal's code is so short that four of them fit between two flushes.
    private let literals = PrefixCode(symbolCount: DeflateSymbols.literalCount, longest: 14)
    private let distances = PrefixCode(symbolCount: DeflateSymbols.distanceCount, longest: 15)
    private let header = DeflateHeader()
    /// For each literal, then for each length, what to write of it.
    private let literalWords: UnsafeMutablePointer<CodeWord>
    private let distanceWords: UnsafeMutablePointer<CodeWord>

    /// Bits, and how many they are.
    private struct CodeWord {
        let bits: UInt32
        let count: UInt32
    }

    private static var firstLengthWord: Int { 256 }

    init() {
        literalWords = .allocate(capacity: Self.firstLengthWord + DeflateSymbols.longestMatch + 1)
        distanceWords = .allocate(capacity: DeflateSymbols.distanceCount)
    }

    deinit {
        literalWords.deallocate()
        distanceWords.deallocate()
    }

    /// Writes the steps that lead to `bytes`, with their histogram; false where they do not fit.
    func write(
        _ steps: UnsafeBufferPointer<DeflateStep>, _ histogram: borrowing DeflateHistogram,
        _ bytes: UnsafeRawBufferPointer, isLast: Bool, to output: inout BitWriter
    ) -> Bool {
        histogram.literals[DeflateSymbols.endOfBlock] = 1
        literals.make(histogram.literals)
        distances.make(histogram.distances)
        header.make(literals, distances)

        let dynamicBits = header.bitCount &+ bitCount(histogram)
        let fixedBits = fixedBitCount(histogram)
        let storedBits = Self.storedBitCount(bytes.count)
        let bits = min(dynamicBits, fixedBits, storedBits)
        guard bits &+ 3 <= output.bitsLeft else { return false }
        if bits == storedBits {
            writeStored(bytes, isLast: isLast, to: &output)
            return true
        }
        output.add(isLast ? 1 : 0, 1)
        if bits == fixedBits {
            output.add(1, 2)
            literals.make(DeflateSymbols.fixedLength)
            distances.make { _ in DeflateSymbols.fixedDistanceLength }
        } else {
            output.add(2, 2)
            header.write(to: &output)
        }
        makeWords()
        writeSteps(steps, bytes.baseAddress.unsafelyUnwrapped, to: &output)
        return true
    }

    // How long a block would be

    /// How many bits the symbols take in the codes made for them.
    private func bitCount(_ histogram: borrowing DeflateHistogram) -> Int {
        Self.bitCount(histogram) {
            Int(literals.lengths[$0])
        } distance: {
            Int(distances.lengths[$0])
        }
    }

    private func fixedBitCount(_ histogram: borrowing DeflateHistogram) -> Int {
        Self.bitCount(histogram, DeflateSymbols.fixedLength) { _ in
            DeflateSymbols.fixedDistanceLength
        }
    }

    @inline(__always)
    private static func bitCount(
        _ histogram: borrowing DeflateHistogram, _ literal: (Int) -> Int,
        distance: (Int) -> Int
    ) -> Int {
        var bits = 0
        for symbol in 0..<DeflateSymbols.literalCount {
            bits &+=
                Int(histogram.literals[symbol])
                &* (literal(symbol) &+ DeflateSymbols.extraBits(symbol))
        }
        for symbol in 0..<DeflateSymbols.distanceCount {
            bits &+=
                Int(histogram.distances[symbol])
                &* (distance(symbol) &+ DeflateSymbols.extraBits(distance: symbol))
        }
        return bits
    }

    private static var mostStored: Int { 65535 }

    /// How many bits the bytes take as they are, each piece with its length; the first may take up
    /// to two more, to the start of a byte.
    private static func storedBitCount(_ byteCount: Int) -> Int {
        byteCount &* 8 &+ max((byteCount &+ mostStored &- 1) / mostStored, 1) &* (8 &+ 32)
    }

    // Writing one

    /// Writes the bytes as they are, in pieces that a length of 16 bits can tell.
    private func writeStored(
        _ bytes: UnsafeRawBufferPointer, isLast: Bool, to output: inout BitWriter
    ) {
        var rest = bytes
        repeat {
            let piece = UnsafeRawBufferPointer(rebasing: rest.prefix(Self.mostStored))
            rest = UnsafeRawBufferPointer(rebasing: rest.dropFirst(piece.count))
            output.add(isLast && rest.isEmpty ? 1 : 0, 3)
            output.alignToByte()
            let count = UInt64(piece.count)
            output.add(count | (~count & 0xFFFF) &<< 16, 32)
            output.flush()
            output.append(piece)
        } while !rest.isEmpty
    }

    private func makeWords() {
        for literal in 0..<256 { literalWords[literal] = word(literal) }
        for length in DeflateSymbols.shortestMatch...DeflateSymbols.longestMatch {
            let symbol = DeflateSymbols.length(length)
            let code = word(symbol)
            // The bits that follow are the lowest of what a length is above its symbol's first.
            let extraBits = UInt32(DeflateSymbols.extraBits(symbol))
            let extra = UInt32(length &- DeflateSymbols.shortestMatch) & (1 &<< extraBits &- 1)
            literalWords[Self.firstLengthWord &+ length] = CodeWord(
                bits: code.bits | extra &<< code.count, count: code.count &+ extraBits)
        }
        for symbol in 0..<DeflateSymbols.distanceCount {
            distanceWords[symbol] = CodeWord(
                bits: UInt32(distances.codes[symbol]), count: UInt32(distances.lengths[symbol]))
        }
    }

    private func word(_ symbol: Int) -> CodeWord {
        CodeWord(bits: UInt32(literals.codes[symbol]), count: UInt32(literals.lengths[symbol]))
    }

    private func writeSteps(
        _ steps: UnsafeBufferPointer<DeflateStep>, _ bytes: UnsafeRawPointer,
        to output: inout BitWriter
    ) {
        // A copy that stays in registers.
        var writer = output
        var next = bytes
        for step in steps {
            writeLiterals(next, step.literals, to: &writer)
            next += step.literals &+ step.length
            if step.length > 0 { writeMatch(step, to: &writer) }
        }
        Self.add(word(DeflateSymbols.endOfBlock), to: &writer)
        writer.flush()
        output = writer
    }

    @inline(__always)
    private func writeLiterals(
        _ bytes: UnsafeRawPointer, _ count: Int, to writer: inout BitWriter
    ) {
        var index = 0
        while index < count {
            let stop = min(index &+ 4, count)
            while index < stop {
                let literal = Int(bytes.load(fromByteOffset: index, as: UInt8.self))
                Self.add(literalWords[literal], to: &writer)
                index &+= 1
            }
            writer.flush()
        }
    }

    @inline(__always)
    private func writeMatch(_ step: DeflateStep, to writer: inout BitWriter) {
        Self.add(literalWords[Self.firstLengthWord &+ step.length], to: &writer)
        let symbol = DeflateSymbols.distance(step.distance)
        Self.add(distanceWords[symbol], to: &writer)
        let extraBits = UInt64(DeflateSymbols.extraBits(distance: symbol))
        writer.add(UInt64(step.distance &- 1) & (1 &<< extraBits &- 1), extraBits)
        writer.flush()
    }

    @inline(__always)
    private static func add(_ word: CodeWord, to writer: inout BitWriter) {
        writer.add(UInt64(word.bits), UInt64(word.count))
    }
}
