import Glibc
import QCOW2
import Synchronization
import TestSupport
import Testing

/// What those who ask for a commit find when they go on, while another one runs.
@Suite("Waiting for a commit")
struct CommitWaitTests {
    @Test(
        "Whoever has lowered counts written waits for those that a running commit lowers",
        arguments: GatedCalls.Call.allCases)
    func loweredCounts(_ call: GatedCalls.Call) throws {
        var builder = ImageBuilder(byteCount: 8.MiB, clusterBits: 12)
        let cluster = UInt64(builder.fill(1, guestCluster: 0) >> 12)
        let bytes = builder.build()
        let device = GatedCalls(RecordingDevice(bytes, yielding: false), gate: call)
        let parts = try Parts(bytes, on: device)
        let counts = Mutex<[UInt64]>([])
        try onThreads(3) { index in
            switch index {
            case 0:
                #expect(try parts.map.update(0, count: 1) { _, _ in .unallocated } == 1)
                try parts.commit.flush()
            case 1:
                device.awaitCall()
                try parts.commit.tidy()
                counts.withLock { $0.append((try? parts.allocator.count(of: cluster)) ?? .max) }
                try parts.commit.tidy()
                #expect(!parts.allocator.hasUnwrittenCounts)
            default:
                device.awaitCall()
                // Nobody who should wait is through by then.
                usleep(50_000)
                #expect(counts.withLock { $0.isEmpty })
                device.open()
            }
        }
        #expect(counts.withLock { $0 } == [0])
    }

    private struct Parts: Sendable {
        let map: ClusterMap
        let allocator: ClusterAllocator
        let commit: Commit

        init(_ bytes: [UInt8], on device: some BlockDevice) throws {
            let file = try HostFile(device)
            let header = try bytes.withUnsafeBytes { try Header.parse($0) }
            map = try ClusterMap(header, in: file, cacheByteCount: 1 << 20)
            allocator = try ClusterAllocator(
                header, in: file, guarded: try MetadataGuard(map: map, tableCount: 1))
            commit = Commit(
                file: file, data: file, map: map, allocator: allocator,
                header: try HeaderSector(of: file), logger: OpenOptions().logger)
        }
    }
}

/// A device one of whose calls waits until it is opened.
final class GatedCalls: ForwardingDevice {
    enum Call: CaseIterable { case flush, punchHole }

    let base: any BlockDevice
    private let gated: Call
    private let gate = Monitor((isOpen: false, hasCome: false))

    init(_ base: any BlockDevice, gate: Call) { (self.base, gated) = (base, gate) }

    /// Returns when somebody waits.
    func awaitCall() { gate.waitFor { $0.hasCome ? () : nil } }

    func open() {
        gate.withLock { $0.isOpen = true }
        gate.announceChange()
    }

    private func pass(_ call: Call) {
        guard call == gated else { return }
        gate.withLock { $0.hasCome = true }
        gate.announceChange()
        gate.waitFor { $0.isOpen ? () : nil }
    }

    func flush() throws(SystemError) {
        pass(.flush)
        try base.flush()
    }

    func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        pass(.punchHole)
        try base.punchHole(range)
    }
}
