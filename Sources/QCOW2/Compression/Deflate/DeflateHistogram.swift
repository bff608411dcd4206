internal import Glibc

/// How often each symbol of a deflate stream occurs.
struct DeflateHistogram: ~Copyable {
    /// Of literals and lengths, by symbol.
    let literals: UnsafeMutablePointer<UInt32>
    let distances: UnsafeMutablePointer<UInt32>

    init() {
        literals = .allocate(capacity: DeflateSymbols.literalCount)
        distances = .allocate(capacity: DeflateSymbols.distanceCount)
        clear()
    }

    deinit {
        literals.deallocate()
        distances.deallocate()
    }

    func clear() {
        literals.initialize(repeating: 0, count: DeflateSymbols.literalCount)
        distances.initialize(repeating: 0, count: DeflateSymbols.distanceCount)
    }

    /// Counts a step, whose literals are at `bytes`.
    @inline(__always)
    func count(_ step: DeflateStep, _ bytes: UnsafeRawPointer) {
        for index in 0..<step.literals {
            literals[Int(bytes.load(fromByteOffset: index, as: UInt8.self))] &+= 1
        }
        guard step.length > 0 else { return }
        literals[DeflateSymbols.length(step.length)] &+= 1
        distances[DeflateSymbols.distance(step.distance)] &+= 1
    }

    func add(_ other: borrowing DeflateHistogram) {
        for symbol in 0..<DeflateSymbols.literalCount {
            literals[symbol] &+= other.literals[symbol]
        }
        for symbol in 0..<DeflateSymbols.distanceCount {
            distances[symbol] &+= other.distances[symbol]
        }
    }

    /// Counts each `step`th byte, and returns how many bits one takes on average.
    func entropy(
        of bytes: UnsafeRawBufferPointer, every step: Int,
        _ logarithms: borrowing WeightedLogarithms
    ) -> Float {
        var total: UInt32 = 0
        for index in stride(from: 0, to: bytes.count, by: step) {
            literals[Int(bytes[index])] &+= 1
            total &+= 1
        }
        var bits = logarithms[total]
        for literal in 0..<256 { bits -= logarithms[literals[literal]] }
        return bits / Float(total)
    }

    /// About how many bits a block takes that has these symbols, and those of another one.
    func cost(with other: borrowing DeflateHistogram, _ logarithms: borrowing WeightedLogarithms)
        -> Float
    {
        Self.cost(literals, other.literals, DeflateSymbols.literalCount, logarithms)
            + Self.cost(distances, other.distances, DeflateSymbols.distanceCount, logarithms)
    }

    /// The symbols' entropy, and what a header says of each that occurs.
    private static func cost(
        _ one: UnsafePointer<UInt32>, _ other: UnsafePointer<UInt32>, _ symbolCount: Int,
        _ logarithms: borrowing WeightedLogarithms
    ) -> Float {
        let headerBits: Float = 5
        var total: UInt32 = 0
        var bits: Float = 0
        for symbol in 0..<symbolCount {
            let count = one[symbol] &+ other[symbol]
            guard count > 0 else { continue }
            total &+= count
            bits += headerBits - logarithms[count]
        }
        return bits + logarithms[total]
    }
}

/// Counts times their binary logarithms; those of small counts are at hand.
struct WeightedLogarithms: ~Copyable {
    private static var smallCount: Int { 1024 }
    private let small: UnsafeMutablePointer<Float>

    init() {
        small = .allocate(capacity: Self.smallCount)
        small[0] = 0
        for count in 1..<Self.smallCount { small[count] = Self.weighted(Float(count)) }
    }

    deinit { small.deallocate() }

    subscript(count: UInt32) -> Float {
        count < Self.smallCount ? small[Int(count)] : Self.weighted(Float(count))
    }

    private static func weighted(_ count: Float) -> Float { count * log2f(count) }
}
