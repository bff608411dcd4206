import QCOW2
import TestSupport
import Testing

/// What a commit writes and syncs, in which order, and what it leaves out.
///
/// Clusters of 4 KiB: header 0, L1 table 1, L2 table 2, guest cluster 0 in 3, refcount table 4, its
/// block 5.
@Suite("The order of a commit")
struct CommitOrderTests {
    static let header = 0, l1 = 1, l2 = 2, data = 3, counts = 5, new = 6

    let device: RecordingDevice
    let image: Image

    init() throws {
        var builder = ImageBuilder(byteCount: 8.MiB, clusterBits: 12)
        #expect(builder.fill(1, guestCluster: 0) == Self.data * 4096)
        device = RecordingDevice(builder.build(), yielding: false)
        image = try Image.open(device)
    }

    enum Step: Equatable, CustomStringConvertible {
        /// A write to a cluster.
        case write(Int)
        case sync
        case cut(Int)

        var description: String {
            switch self {
            case .write(let cluster): "\(cluster)"
            case .sync: "sync"
            case .cut(let byteCount): "cut \(byteCount)"
            }
        }
    }

    /// What `body` brings the device to do.
    func steps(_ body: () throws -> Void) rethrows -> [Step] {
        let before = device.moments.count
        try body()
        return device.moments[before...].compactMap { moment in
            switch moment {
            case .write(_, let offset, _): .write(offset / 4096)
            case .flushed: .sync
            case .resize(_, let byteCount): .cut(byteCount)
            default: nil
            }
        }
    }

    func write(cluster: Int, _ byte: UInt8 = 2) throws {
        try image.write([UInt8](repeating: byte, count: 4096), at: cluster * 4096)
    }

    @Test("What is written in place needs one sync, and so does nothing at all")
    func inPlace() throws {
        #expect(try steps { try write(cluster: 0) } == [.write(Self.data)])
        #expect(try steps { try image.flush() } == [.sync])
        #expect(try steps { try image.flush() } == [.sync])
    }

    @Test("Data and counts are there before entries, entries before anything else goes on")
    func allocation() throws {
        #expect(try steps { try write(cluster: 1) } == [.write(Self.new)])
        #expect(
            try steps { try image.flush() } == [
                .write(Self.counts), .sync, .write(Self.l2), .sync,
            ])
        #expect(try steps { try image.flush() } == [.sync])
    }

    @Test("A new L2 table is there before its L1 entry")
    func newTable() throws {
        #expect(
            try steps { try write(cluster: 512) }.filter { $0 != .write(Self.counts) } == [
                .write(Self.new), .write(Self.new + 1),
            ])
        let order = try steps { try image.flush() }
        #expect(order.first == .write(Self.counts) && order.last == .sync)
        #expect(order.count { $0 == .sync } == 2)
        let between = try #require(order.firstIndex(of: .sync))
        #expect(order.firstIndex(of: .write(Self.l1)).map { $0 > between } == true)
        #expect(!order[..<between].contains(.write(Self.l1)))
    }

    @Test(
        "A cluster that is dropped shows nothing: one sync; its count follows with the next commit")
    func discard() throws {
        try write(cluster: 1)
        try image.flush()
        #expect(try steps { try image.discard(4096..<8192) } == [])
        // Its space is given back once that is safe, which the device records as a write.
        #expect(
            try steps { try image.flush() } == [.write(Self.l2), .sync, .write(Self.new)])
        // Its count is lowered in memory, which keeps no flush waiting.
        #expect(try steps { try image.flush() } == [.sync])
        #expect(device.bytes.number(at: Self.counts * 4096 + Self.new * 2, as: UInt16.self) == 1)
        // The next one takes it along, and may use the cluster again.
        #expect(try steps { try write(cluster: 2) } == [.write(Self.new)])
        #expect(
            try steps { try image.flush() } == [
                .write(Self.counts), .sync, .write(Self.l2), .sync,
            ])
    }

    @Test("A cluster is not used again before the entry that had it is gone for good")
    func reuse() throws {
        try write(cluster: 1)
        try image.flush()
        try image.discard(4096..<8192)
        #expect(try steps { try write(cluster: 2) } == [.write(Self.new + 1)])
        try image.flush()
        #expect(try steps { try write(cluster: 3) } == [.write(Self.new)])
    }

    @Test("Closing brings the counts down too, in one more commit")
    func closing() throws {
        try write(cluster: 1)
        try image.flush()
        try image.discard(4096..<8192)
        let order = try steps { try image.close() }
        #expect(order.last == .sync)
        let entry = try #require(order.firstIndex(of: .write(Self.l2)))
        let count = try #require(order.firstIndex(of: .write(Self.counts)))
        #expect(order[entry..<count].contains(.sync), "\(order)")
        #expect(device.bytes.number(at: Self.counts * 4096 + Self.new * 2, as: UInt16.self) == 0)
    }

    @Test("An image that nobody changed is closed as it is")
    func unchanged() throws {
        let order = try steps { try image.close() }
        #expect(order.allSatisfy { $0 == .sync })
        #expect(device.bytes == device.initial)
    }
}
