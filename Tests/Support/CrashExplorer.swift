internal import Glibc

/// Makes the states that a power cut could leave of a recorded device, one after the other.
///
/// An aligned 512-byte sector is old or new, never mixed.  A sync that returned has made durable
/// every write that had returned before the sync was called.  Of the rest any sector may have
/// landed, in any of the versions written since.
package struct CrashExplorer {
    package static let sectorSize = 512

    /// Most states made of one moment, and how they are chosen.
    package struct Effort: Sendable {
        package var prefixes = 24
        package var singles = 8
        package var subsets = 24
        package init(prefixes: Int = 24, singles: Int = 8, subsets: Int = 24) {
            (self.prefixes, self.singles, self.subsets) = (prefixes, singles, subsets)
        }
    }

    private struct Landing {
        let sector: Int
        let write: Int
        /// Where the sector's bytes lie in the write, and how many are meant.
        let within: Range<Int>
        let start: Int
    }

    private struct Pending {
        let call: Int
        let offset: Int
        let bytes: [UInt8]
        /// Whether the file ends at `offset` then; its bytes behind it are zeros.
        var cuts = false
        var hasReturned = false
    }

    private var durable: [UInt8]
    private var durableLength: Int
    private var pending: [Pending] = []
    private var covered: [Int: Set<Int>] = [:]
    private var random: RepeatableRandom
    private let effort: Effort
    package private(set) var stateCount = 0

    package init(initial: [UInt8], seed: UInt64, effort: Effort = Effort()) {
        durable = initial
        durableLength = initial.count
        random = RepeatableRandom(seed: seed)
        self.effort = effort
    }

    /// Takes one moment of the record in.
    package mutating func advance(_ moment: RecordingDevice.Moment) {
        switch moment {
        case .write(let call, let offset, let bytes):
            pending.append(Pending(call: call, offset: offset, bytes: bytes))
        case .resize(let call, let byteCount):
            let rest = [UInt8](repeating: 0, count: max(0, durable.count - byteCount))
            pending.append(Pending(call: call, offset: byteCount, bytes: rest, cuts: true))
        case .returned(let call):
            for index in pending.indices where pending[index].call == call {
                pending[index].hasReturned = true
            }
        case .flush(let call, let part):
            covered[call] = Set(
                pending.filter { $0.hasReturned && part?.contains($0.offset) ?? true }.map(\.call))
        case .flushed(let call):
            settle(covered.removeValue(forKey: call) ?? [])
        case .note:
            break
        }
    }

    private mutating func settle(_ calls: Set<Int>) {
        for write in pending where calls.contains(write.call) {
            durable.put(write.bytes, at: write.offset)
            let end = write.offset + write.bytes.count
            durableLength = write.cuts ? write.offset : max(durableLength, end)
        }
        pending.removeAll { calls.contains($0.call) }
    }

    /// Hands `body` the state that is durable at this moment.
    package func withDurable<Result>(_ body: (UnsafeRawBufferPointer) -> Result) -> Result {
        durable.withUnsafeBytes { bytes in
            body(UnsafeRawBufferPointer(rebasing: bytes[..<min(durableLength, bytes.count)]))
        }
    }

    /// Hands `judge` states that a cut at this moment could leave, until it finds fault.
    package mutating func explore(
        _ judge: (UnsafeRawBufferPointer) -> String?
    ) -> String? {
        let landings = landings()
        var choices: [[Int]] = [[]]
        if !landings.isEmpty {
            choices.append(Array(landings.indices))
            choices += prefixes(of: landings.count)
            choices += singles(of: landings.count)
            choices += subsets(of: landings.count)
        }
        for choice in choices {
            if let fault = judged(choice, of: landings, by: judge) { return fault }
        }
        return nil
    }

    private func landings() -> [Landing] {
        var landings: [Landing] = []
        for (index, write) in pending.enumerated() {
            var position = write.offset
            let end = write.offset + write.bytes.count
            while position < end {
                let next = min(end, (position / Self.sectorSize + 1) * Self.sectorSize)
                landings.append(
                    Landing(
                        sector: position / Self.sectorSize, write: index,
                        within: position - write.offset..<next - write.offset, start: position))
                position = next
            }
        }
        return landings
    }

    private mutating func prefixes(of count: Int) -> [[Int]] {
        let step = max(1, count / max(1, effort.prefixes))
        return stride(from: 1, to: count, by: step).map { Array(0..<$0) }
    }

    private mutating func singles(of count: Int) -> [[Int]] {
        (0..<min(effort.singles, count)).flatMap { _ in
            let one = random.number(below: count)
            return [[one], (0..<count).filter { $0 != one }]
        }
    }

    private mutating func subsets(of count: Int) -> [[Int]] {
        guard count > 1 else { return [] }
        return (0..<effort.subsets).map { _ in
            let density = random.number(below: 7) + 1
            return (0..<count).filter { _ in random.number(below: 8) < density }
        }
    }

    /// How long the file is at least: as the last sync left it, or as a later change of the length
    /// or a write behind the end, whose bytes need not have landed, would have it.
    private mutating func fileLength() -> Int {
        let lengths = pending.compactMap { write in
            let end = write.offset + write.bytes.count
            return write.cuts ? write.offset : end > durableLength ? end : nil
        }
        guard !lengths.isEmpty, random.chance(oneIn: 3) else { return durableLength }
        return lengths[random.number(below: lengths.count)]
    }

    /// Builds the state in place, has it judged, and takes it back.
    private mutating func judged(
        _ choice: [Int], of landings: [Landing], by judge: (UnsafeRawBufferPointer) -> String?
    ) -> String? {
        stateCount += 1
        var undo: [(Int, [UInt8])] = []
        var length = fileLength()
        for index in choice {
            let landing = landings[index]
            let end = landing.start + landing.within.count
            if end > durable.count {
                durable.append(contentsOf: repeatElement(0, count: end - durable.count))
            }
            undo.append((landing.start, Array(durable[landing.start..<end])))
            durable.withUnsafeMutableBytes { target in
                pending[landing.write].bytes.withUnsafeBytes { source in
                    UnsafeMutableRawBufferPointer(rebasing: target[landing.start..<end])
                        .copyMemory(from: UnsafeRawBufferPointer(rebasing: source[landing.within]))
                }
            }
            length = max(length, end)
        }
        if length > durable.count {
            durable.append(contentsOf: repeatElement(0, count: length - durable.count))
        }
        let fault = durable.withUnsafeBytes {
            judge(UnsafeRawBufferPointer(rebasing: $0[..<min(length, $0.count)]))
        }
        for (start, bytes) in undo.reversed() { durable.put(bytes, at: start) }
        return fault
    }
}
