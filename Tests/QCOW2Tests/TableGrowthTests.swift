import QCOW2
import Synchronization
import TestSupport
import Testing

/// Refcount tables that are full: every entry leads to the same block, which counts each of its 64
/// clusters as in use.  Clusters of 512 bytes and counts of 64 bits, as in `AllocatorTests`.
@Suite("Growing a long refcount table")
struct TableGrowthTests {
    private let disk: RAMDisk
    private let device: BadSectorDevice
    private let allocator: ClusterAllocator

    init() throws { try self.init(tableClusterCount: 64) }

    private init(tableClusterCount: Int) throws {
        var bytes = ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: 6).build()
        let (table, block) = (8 * 512, 3 * 512)
        for index in 0..<64 { bytes.put(UInt64(1), at: block + index * 8) }
        bytes.put(UInt64(table), at: 48)
        bytes.put(UInt32(tableClusterCount), at: 56)
        bytes.put([UInt8](repeating: 0, count: tableClusterCount * 512), at: table)
        for index in 0..<tableClusterCount * 64 { bytes.put(UInt64(block), at: table + index * 8) }
        let disk = RAMDisk(name: "disk.qcow2")
        try bytes.withUnsafeBytes { try disk.write($0, at: 0) }
        self.disk = disk
        device = BadSectorDevice(disk)
        let file = try HostFile(device)
        let header = try bytes.withUnsafeBytes { try Header.parse($0) }
        let map = try ClusterMap(header, in: file, cacheByteCount: 1 << 20)
        let guarded = try MetadataGuard(map: map, tableCount: 8)
        allocator = try ClusterAllocator(header, in: file, guarded: guarded)
    }

    @Test("Counts that could not be read are read again")
    func unreadCounts() throws {
        device.fail(at: 3 * 512)
        #expect(throws: ImageError.self) { try allocator.count(of: 7) }
        #expect(try allocator.count(of: 7) == 1)
    }

    @Test("Blocks for a table that could not grow are forgotten")
    func forgottenBlocks() throws {
        // A table of 96 clusters and its blocks need two blocks, of which the second fails.
        let first: UInt64 = 4096 * 64
        device.fail(at: (first + 1) * 512)
        #expect(throws: ImageError.self) { try allocator.allocate(1) }
        #expect(device.hasFailed)
        let frozen = allocator.freeze()
        #expect(frozen.movedTable == nil && frozen.pages.isEmpty && frozen.dropped.isEmpty)
        try allocator.writeCounts()
        var block = [UInt8](repeating: 1, count: 512)
        _ = try block.withUnsafeMutableBytes { try disk.read(into: $0, at: first * 512) }
        #expect(block == [UInt8](repeating: 0, count: 512))
        // The range gets a block elsewhere, which knows nothing of the one before.
        try allocator.free([ClusterRun(first: 1000, count: 200)])
        #expect(try allocator.allocate(300, exactly: true) == nil)
        #expect(allocator.freeze().tableOffset == 1000 * 512)
        #expect(try (first..<first + 64).allSatisfy { try allocator.count(of: $0) == 0 })
    }

    @Test("Who comes after that tries again")
    func secondTry() throws {
        device.fail(at: (4096 * 64 + 1) * 512)
        #expect(throws: ImageError.self) { try allocator.allocate(1) }
        #expect(try allocator.allocate(1) == nil)
        #expect(allocator.freeze().tableClusterCount == 96)
    }

    @Test("A stream that finds no room makes some, as whole clusters do")
    func streams() throws {
        #expect(try allocator.allocateStream(100) == nil)
        #expect(allocator.freeze().tableClusterCount == 96)
    }

    @Test("Free clusters at the table's end are handed out, unless they are too few")
    func atTheEnd() throws {
        let last = ClusterRun(first: 4096 * 64 - 2, count: 2)
        for exactly in [false, true] {
            let allocator = try TableGrowthTests().allocator
            try allocator.free([last])
            #expect(try allocator.allocate(5, exactly: exactly) == (exactly ? nil : last))
        }
    }

    @Test("A table grows up to 8 MiB")
    func longTable() throws {
        // By half of it.
        let clusterCount = (8.MiB / 512 * 2 + 1) / 3
        let test = try TableGrowthTests(tableClusterCount: clusterCount)
        test.allocator.nextCluster = UInt64(clusterCount * 64 * 64) - 1
        #expect(try test.allocator.allocate(1) == nil)
        #expect(test.allocator.freeze().tableClusterCount == 8.MiB / 512)
    }

    @Test("A table does not grow past 8 MiB")
    func longestTable() throws {
        let test = try TableGrowthTests(tableClusterCount: 8.MiB / 512)
        test.allocator.nextCluster = UInt64(8.MiB / 8 * 64) - 1
        #expect {
            try test.allocator.allocate(1)
        } throws: { "\($0)".contains("the refcount table cannot grow any more") }
    }
}

/// A device on which one read fails, once, by its offset.
private final class BadSectorDevice: ForwardingDevice {
    let base: any BlockDevice
    private let badOffset = Atomic(UInt64.max)

    init(_ base: any BlockDevice) { self.base = base }

    func fail(at offset: UInt64) { badOffset.store(offset, ordering: .relaxed) }
    var hasFailed: Bool { badOffset.load(ordering: .relaxed) == .max }

    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        let isBad = badOffset.compareExchange(
            expected: offset, desired: .max, ordering: .relaxed
        ).exchanged
        if isBad { throw .inputOutput }
        return try base.read(into: buffer, at: offset)
    }
}
