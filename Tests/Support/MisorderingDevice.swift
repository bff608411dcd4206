package import QCOW2
internal import Synchronization

/// A device that breaks the order an engine asked for, to see that the judges notice.
package final class MisorderingDevice: BlockDevice {
    package enum Mistake: String, Sendable, CaseIterable {
        /// The sync between new counts and the tables that need them does not happen.
        case dropsSyncAfterCounts
        /// Refcount blocks reach the disk only after the sync that should cover them.
        case delaysCounts
        /// Syncs return without having done anything.
        case liesAboutSyncs
        /// The sync after the tables does not happen, the one after the counts does.
        case dropsSyncAfterTables

    }

    private struct State {
        var hasWrittenCounts = false
        var held: [(offset: Int, bytes: [UInt8])] = []
    }

    private let base: RecordingDevice
    private let mistake: Mistake
    private let state = Mutex(State())

    package init(_ base: RecordingDevice, _ mistake: Mistake) {
        (self.base, self.mistake) = (base, mistake)
    }

    package var name: String { base.name }
    package var readsZerosPastEnd: Bool { base.readsZerosPastEnd }
    package func byteCount() throws(SystemError) -> UInt64 { try base.byteCount() }
    package func resize(to byteCount: UInt64) throws(SystemError) {
        try base.resize(to: byteCount)
    }
    package func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        try base.punchHole(range)
    }

    package func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        let count = try base.read(into: buffer, at: offset)
        for (start, bytes) in state.withLock({ $0.held }) {
            for (index, byte) in bytes.enumerated() {
                let position = start + index - Int(offset)
                if position >= 0 && position < count { buffer[position] = byte }
            }
        }
        return count
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        if isRefcountBlock(at: Int(offset)) {
            state.withLock { $0.hasWrittenCounts = true }
            if mistake == .delaysCounts {
                return state.withLock { $0.held.append((Int(offset), [UInt8](bytes))) }
            }
        }
        try base.write(bytes, at: offset)
    }

    package func flush() throws(SystemError) {
        let (counts, held) = state.withLock { state in
            defer { (state.hasWrittenCounts, state.held) = (false, []) }
            return (state.hasWrittenCounts, state.held)
        }
        switch mistake {
        case .dropsSyncAfterCounts: if counts { return }
        case .dropsSyncAfterTables: if !counts { return }
        case .liesAboutSyncs: return
        case .delaysCounts: break
        }
        try base.flush()
        for (offset, bytes) in held {
            var failure: SystemError?
            bytes.withUnsafeBytes { buffer in
                do throws(SystemError) { try base.write(buffer, at: UInt64(offset)) } catch {
                    failure = error
                }
            }
            if let failure { throw failure }
        }
    }

    /// Whether a refcount block that the image's table names lies at `offset`.
    private func isRefcountBlock(at offset: Int) -> Bool {
        base.withBytes { bytes in
            guard let reader = try? ReferenceReader(bytes) else { return false }
            let entries = reader.refcountTableClusters * reader.entriesPerTable
            let start = UInt64(offset / reader.clusterSize * reader.clusterSize)
            return start != 0
                && (0..<entries).contains { index in
                    reader.number(reader.refcountTableOffset + index * 8) & ~0x1ff == start
                }
        }
    }
}
