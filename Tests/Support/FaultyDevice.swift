internal import Glibc
package import QCOW2
internal import Synchronization

/// A device whose n-th call of a kind fails, once, a number of times or from then on.
package final class FaultyDevice: ForwardingDevice {
    package enum Kind: Sendable, CaseIterable { case read, write, flush, punch, resize, reserve }

    package struct Fault: Sendable {
        package var kind: Kind
        /// Which call of the kind fails, counted from 0.
        package var call: Int
        package var error: SystemError
        /// How many calls fail from that one on.
        package var times: Int
        /// Bytes that a failing write stores before it fails.
        package var storing: Int

        package init(
            _ kind: Kind, call: Int, error: SystemError = .inputOutput, lasts: Bool = false,
            times: Int = 1, storing: Int = 0
        ) {
            (self.kind, self.call, self.error) = (kind, call, error)
            (self.times, self.storing) = (lasts ? Int.max : times, storing)
        }
    }

    package let base: any BlockDevice
    private let fault: Fault
    private let calls = Mutex<[Kind: Int]>([:])
    private let hasFailed = Atomic(false)

    package init(_ base: any BlockDevice, _ fault: Fault) {
        (self.base, self.fault) = (base, fault)
    }

    /// Whether the fault has happened.
    package var failed: Bool { hasFailed.load(ordering: .acquiring) }

    private func isDue(_ kind: Kind) -> Bool {
        let number = calls.withLock { calls in
            defer { calls[kind, default: 0] += 1 }
            return calls[kind, default: 0]
        }
        let due = kind == fault.kind && number >= fault.call && number - fault.call < fault.times
        if due { hasFailed.store(true, ordering: .releasing) }
        return due
    }

    package func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        if isDue(.read) { throw fault.error }
        return try base.read(into: buffer, at: offset)
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        guard isDue(.write) else { return try base.write(bytes, at: offset) }
        let stored = min(fault.storing, bytes.count)
        if stored > 0 {
            try base.write(UnsafeRawBufferPointer(rebasing: bytes[..<stored]), at: offset)
        }
        throw fault.error
    }

    package func flush() throws(SystemError) {
        if isDue(.flush) { throw fault.error }
        try base.flush()
    }

    package func resize(to byteCount: UInt64) throws(SystemError) {
        if isDue(.resize) { throw fault.error }
        try base.resize(to: byteCount)
    }

    package func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        if isDue(.punch) { throw fault.error }
        try base.punchHole(range)
    }

    package func reserve(_ range: Range<UInt64>) throws(SystemError) {
        if isDue(.reserve) { throw fault.error }
        try base.reserve(range)
    }
}
