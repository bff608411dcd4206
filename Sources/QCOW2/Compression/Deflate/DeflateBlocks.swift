/// Cuts a stream's steps into blocks: one ends where other codes for what follows save more than
/// their header takes.
struct DeflateBlocks: ~Copyable {
    /// After so many steps, or bytes, of a part it is decided whether the block goes on with it.
    private static var partStepCount: Int { 1024 }
    private static var partByteCount: Int { 16384 }
    private static var capacity: Int { 24 * partStepCount }

    private let writer = DeflateBlockWriter()
    private let logarithms = WeightedLogarithms()
    private let none = DeflateHistogram()
    /// The steps of the block, then those of the part behind it.
    private let steps: UnsafeMutablePointer<DeflateStep>
    private let block = DeflateHistogram()
    private let part = DeflateHistogram()

    private var bytes: UnsafeRawPointer
    private var output: BitWriter
    private var stepCount = 0
    private var blockStepCount = 0
    private var blockCost: Float = 0
    /// Where the block, the part and the next step start, in bytes.
    private var blockStart = 0
    private var partStart = 0
    private var position = 0

    init() {
        steps = .allocate(capacity: Self.capacity)
        bytes = UnsafeRawPointer(steps)
        output = BitWriter(UnsafeMutableRawBufferPointer(start: steps, count: 0))
    }

    deinit { steps.deallocate() }

    /// Starts a stream.
    mutating func begin(_ cluster: UnsafeRawPointer, _ room: UnsafeMutableRawBufferPointer) {
        bytes = cluster
        output = BitWriter(room)
        stepCount = 0
        blockStepCount = 0
        blockStart = 0
        partStart = 0
        position = 0
        block.clear()
        part.clear()
    }

    /// How many bits a byte of the cluster takes on average, judged by some of them.
    func literalBits(_ cluster: UnsafeRawPointer, _ byteCount: Int) -> Float {
        defer { part.clear() }
        return part.entropy(
            of: UnsafeRawBufferPointer(start: cluster, count: byteCount), every: 5, logarithms)
    }

    /// Goes on with at most `DeflateStep.mostLiterals` literals, and a match; false where the
    /// stream does not fit.
    @inline(__always)
    mutating func add(literals: Int, _ match: MatchFinder.Match) -> Bool {
        let step = DeflateStep(literals: literals, match)
        steps[stepCount] = step
        stepCount &+= 1
        part.count(step, bytes + position)
        position &+= literals &+ match.length
        guard
            stepCount &- blockStepCount >= Self.partStepCount
                || position &- partStart >= Self.partByteCount
        else { return true }
        return endPart()
    }

    /// Ends the stream, and returns how many bytes it has; nil where it does not fit.
    mutating func end() -> Int? {
        guard stepCount == blockStepCount || endPart(), writeBlock(isLast: true) else { return nil }
        output.alignToByte()
        return output.byteCount
    }

    /// Makes the part one with the block, or writes the block and starts another one with it.
    private mutating func endPart() -> Bool {
        let together = block.cost(with: part, logarithms)
        let alone = part.cost(with: none, logarithms)
        let isFull = stepCount &+ Self.partStepCount > Self.capacity
        if blockStepCount == 0 || (together <= blockCost + alone && !isFull) {
            blockCost = together
        } else {
            guard writeBlock(isLast: false) else { return false }
            steps.update(from: steps + blockStepCount, count: stepCount &- blockStepCount)
            stepCount &-= blockStepCount
            block.clear()
            blockCost = alone
            blockStart = partStart
        }
        block.add(part)
        part.clear()
        blockStepCount = stepCount
        partStart = position
        return true
    }

    private mutating func writeBlock(isLast: Bool) -> Bool {
        writer.write(
            UnsafeBufferPointer(start: steps, count: blockStepCount), block,
            UnsafeRawBufferPointer(start: bytes + blockStart, count: partStart &- blockStart),
            isLast: isLast, to: &output)
    }
}
