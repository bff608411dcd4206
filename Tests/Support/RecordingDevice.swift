internal import Glibc
package import QCOW2
internal import Synchronization

/// A device in RAM that records in which order writes, syncs and their returns happened, so that
/// every state a power cut could leave behind can be made from the record (`CrashExplorer`).
package final class RecordingDevice: BlockDevice {
    package typealias Call = Int

    /// One moment of the record, in the order in which the moments happened.
    package enum Moment: Sendable {
        /// A write was called: from now on any of its sectors may be on the disk.
        case write(Call, offset: Int, bytes: [UInt8])
        /// The length was set; bytes past a smaller one are gone.
        case resize(Call, byteCount: Int)
        case returned(Call)
        /// A sync was called; nil stands for the whole device.
        case flush(Call, of: Range<Int>?)
        case flushed(Call)
        /// What a client of the engine noted; its meaning is the test's.
        case note(any Sendable)
    }

    private struct State {
        var current: [UInt8]
        var moments: [Moment] = []
        var nextCall = 0
        var random: RepeatableRandom
    }

    package let name: String
    package let readsZerosPastEnd = true
    /// What the record starts from, all of it durable.
    package let initial: [UInt8]
    private let state: Mutex<State>
    private let yields: Bool

    /// `yielding`: let other threads in between a call and its return, as a real disk does; which
    /// ones, chance decides, or the seed of `takingTurns`.
    package init(
        _ bytes: [UInt8], name: String = "recorded.qcow2", seed: UInt64 = 1, yielding: Bool = true
    ) {
        initial = bytes
        self.name = name
        yields = yielding
        state = Mutex(State(current: bytes, random: RepeatableRandom(seed: seed)))
    }

    /// The bytes as a reader sees them now, durable or not.
    package var bytes: [UInt8] { state.withLock { $0.current } }
    package func withBytes<Result: Sendable>(_ body: (UnsafeRawBufferPointer) -> Result) -> Result {
        state.withLock { $0.current.withUnsafeBytes(body) }
    }

    package var moments: [Moment] { state.withLock { $0.moments } }
    package var syncCount: Int {
        moments.count { if case .flushed = $0 { true } else { false } }
    }

    package func note(_ note: any Sendable) { state.withLock { $0.moments.append(.note(note)) } }

    package func byteCount() throws(SystemError) -> UInt64 {
        state.withLock { UInt64($0.current.count) }
    }

    package func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        if yields { passTurn() }
        return state.withLock { state in
            guard offset < UInt64(state.current.count) else { return 0 }
            let start = Int(offset)
            let count = min(buffer.count, state.current.count - start)
            state.current.withUnsafeBytes {
                buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: $0[start..<start + count]))
            }
            return count
        }
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        record([UInt8](bytes), at: Int(offset))
    }

    package func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        let length = UInt64(try byteCount())
        guard range.lowerBound < length else { return }
        let end = min(range.upperBound, length)
        record(
            [UInt8](repeating: 0, count: Int(end - range.lowerBound)), at: Int(range.lowerBound))
    }

    package func resize(to byteCount: UInt64) throws(SystemError) {
        let call = state.withLock { state in
            let length = Int(byteCount)
            if length < state.current.count {
                state.current.removeLast(state.current.count - length)
            } else {
                state.current.append(
                    contentsOf: repeatElement(0, count: length - state.current.count))
            }
            return begin(.resize(state.nextCall, byteCount: length), in: &state)
        }
        end(.returned(call))
    }

    package func reserve(_ range: Range<UInt64>) throws(SystemError) {
        if range.upperBound > (try byteCount()) { try resize(to: range.upperBound) }
    }

    package func flush() throws(SystemError) { flush(of: nil) }

    /// A sync of a part that stands for a device of its own.
    func flush(of part: Range<Int>?) {
        let call = state.withLock { begin(.flush($0.nextCall, of: part), in: &$0) }
        if yields, !passTurn() { usleep(30) }
        end(.flushed(call))
    }

    private func record(_ bytes: [UInt8], at offset: Int) {
        let call = state.withLock { state in
            state.current.put(bytes, at: offset)
            return begin(.write(state.nextCall, offset: offset, bytes: bytes), in: &state)
        }
        pause()
        end(.returned(call))
    }

    private func begin(_ moment: Moment, in state: inout State) -> Call {
        state.moments.append(moment)
        state.nextCall += 1
        return state.nextCall - 1
    }

    private func end(_ moment: Moment) { state.withLock { $0.moments.append(moment) } }

    private func pause() {
        guard yields, !passTurn() else { return }
        switch state.withLock({ $0.random.number(below: 8) }) {
        case 0: usleep(20)
        case 1, 2: sched_yield()
        default: break
        }
    }
}
