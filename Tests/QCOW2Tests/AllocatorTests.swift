import QCOW2
import TestSupport
import Testing

/// The clusters that are handed out, and the counts and tables that come of it, to the number.
///
/// Clusters of 512 bytes and counts of 64 bits: a block counts 64 clusters, a cluster of the table
/// has 64 blocks.  An image begins with its header (cluster 0), L1 table (1), refcount table (2)
/// and one block (3).
@Suite("Handing out clusters")
struct AllocatorTests {
    let device: RecordingDevice
    let file: HostFile
    let guarded: MetadataGuard
    let allocator: ClusterAllocator

    init() throws {
        try self.init(ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: 6))
    }

    init(_ builder: ImageBuilder, cacheByteCount: Int = 1 << 20) throws {
        let bytes = builder.build()
        device = RecordingDevice(bytes, yielding: false)
        file = try HostFile(device)
        let header = try bytes.withUnsafeBytes { try Header.parse($0) }
        let map = try ClusterMap(header, in: file, cacheByteCount: 1 << 20)
        guarded = try MetadataGuard(map: map, tableCount: 8)
        allocator = try ClusterAllocator(
            header, in: file, guarded: guarded, cacheByteCount: cacheByteCount)
    }

    func run(_ first: UInt64, _ count: UInt64) -> ClusterRun {
        ClusterRun(first: first, count: count)
    }

    /// How many blocks a commit makes known, with those before.
    func blockCount(_ frozen: ClusterAllocator.Frozen) -> Int {
        let bytes = frozen.movedTable ?? frozen.pages.pieces.flatMap(\.bytes)
        return (0..<bytes.count / 8).count { bytes.number(at: $0 * 8, as: UInt64.self) != 0 }
    }

    func counts(_ clusters: Range<UInt64>) throws -> [UInt64] {
        try clusters.map { try allocator.count(of: $0) }
    }

    /// The offsets of `count` blocks that lie one behind the other from cluster `first` on, as
    /// bytes of the refcount table.
    func entries(_ clusters: [UInt64], paddedTo count: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count * 8)
        for (index, cluster) in clusters.enumerated() { bytes.put(cluster * 512, at: index * 8) }
        return bytes
    }

    @Test("Blocks for the writes to come are made ahead, and a longer table for them")
    func growth() throws {
        #expect(try counts(0..<5) == [1, 1, 1, 1, 0])
        #expect(!allocator.isTableDirty && !allocator.hasUnwrittenCounts)
        // A request takes up to 1 MiB: 2048 clusters, 32 tables and two.  Room for two and 16 more
        // is 66 blocks.  All of the first range goes for 60 of them; each later one counts itself.
        #expect(try allocator.allocate(1) == nil)
        #expect(try counts(0..<64) == [UInt64](repeating: 1, count: 64))
        #expect(try allocator.count(of: 64) == 0)
        #expect(allocator.isTableDirty && allocator.hasUnwrittenCounts)
        #expect(allocator.takeUnsyncedIncrements())
        #expect(!allocator.takeUnsyncedIncrements())
        allocator.putBackUnsyncedIncrements()
        #expect(allocator.takeUnsyncedIncrements())
        // Block 64 needs a longer table, which follows it; that makes 68 blocks.
        let alone = [61, 62, 63, 64, 65, 66, 67].map { UInt64($0 * 64) }
        for first in alone {
            let expected: [UInt64] = first == 64 * 64 ? [1, 1, 1, 0] : [1, 0, 0, 0]
            #expect(try counts(first..<first + 4) == expected, "\(first)")
        }
        let frozen = allocator.freeze()
        #expect(frozen.tableOffset == 4097 * 512 && frozen.tableClusterCount == 2)
        #expect(frozen.movedTable == entries([3] + Array(4...63) + alone, paddedTo: 128))
        #expect(frozen.dropped == [run(2, 1)] && frozen.pages.isEmpty)
        #expect(!allocator.isTableDirty && allocator.hasUnwrittenCounts)
        // The ranges are known now.
        #expect(allocator.nextCluster == 64)
        #expect(try allocator.allocate(3) == run(64, 3))
        #expect(allocator.nextCluster == 67)
        #expect(try counts(63..<68) == [1, 1, 1, 1, 0])
        #expect(!allocator.isTableDirty)
    }

    @Test("Metadata is guarded as soon as it is placed, and no longer than it lies there")
    func guards() throws {
        #expect([0, 1, 2, 3, 4].map(guarded.isMetadata) == [true, true, true, true, false])
        _ = try allocator.allocate(1)
        let blocks = [UInt64](4...63) + [61 * 64, 62 * 64, 63 * 64, 64 * 64, 67 * 64]
        #expect(blocks.allSatisfy(guarded.isMetadata))
        #expect(
            [2, 4097, 4098, 4099, 65 * 64 + 1].map(guarded.isMetadata)
                == [false, true, true, false, false])
        for (offset, count, isMetadata) in [
            (4097 * 512, 1, true), (4098 * 512 + 511, 1, true), (4099 * 512, 512, false),
            (4095 * 512, 512, false), (4095 * 512, 513, true), (4099 * 512 - 1, 2, true),
        ] as [(UInt64, UInt64, Bool)] {
            #expect(guarded.overlaps(offset, count) == isMetadata, "\(offset)")
        }
        #expect(guarded.collision() == nil)
    }

    @Test(
        "The counts that are written are those in memory, whatever memory there is",
        arguments: [0, 1 << 20])
    func writesCounts(cacheByteCount: Int) throws {
        let parts = try AllocatorTests(
            ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: 6),
            cacheByteCount: cacheByteCount)
        let (allocator, device) = (parts.allocator, parts.device)
        _ = try allocator.allocate(1)
        _ = allocator.freeze()
        #expect(try allocator.allocate(40) == run(64, 40))
        #expect(allocator.takeUnsyncedIncrements())
        #expect(try allocator.allocate(1) == run(104, 1) && allocator.takeUnsyncedIncrements())
        try allocator.free([run(104, 1)])
        try allocator.writeCounts()
        #expect(!allocator.hasUnwrittenCounts)
        let written = device.moments.count
        try allocator.writeCounts()
        #expect(device.moments.count == written)
        func block(_ cluster: Int) -> [UInt64] {
            (0..<64).map { device.bytes.number(at: cluster * 512 + $0 * 8, as: UInt64.self) }
        }
        // Counts that are looked at are not written again.
        for cluster in stride(from: 0, to: 4096, by: 64) as StrideTo<UInt64> {
            _ = try allocator.count(of: cluster)
        }
        try allocator.free([run(103, 1)])
        try allocator.writeCounts()
        #expect(
            device.moments.count { if case .write = $0 { true } else { false } }
                == parts.writeCount(before: written) + 1)
        #expect(try allocator.allocate(1) == run(103, 1))
        #expect(block(3) == [UInt64](repeating: 1, count: 64))
        #expect(block(4) == (0..<64).map { $0 < 39 ? 1 : 0 })
        #expect(block(5) == [UInt64](repeating: 0, count: 64))
        #expect(block(64 * 64) == (0..<64).map { $0 < 3 ? 1 : 0 })
    }

    @Test("Free clusters are handed out from the lowest up, whole or in part")
    func lowestFirst() throws {
        _ = try allocator.allocate(1)
        _ = allocator.freeze()
        #expect(try allocator.allocate(20) == run(64, 20))
        try allocator.free([run(70, 2), run(74, 3)])
        #expect(allocator.nextCluster == 70)
        #expect(try allocator.allocate(3, exactly: true) == run(74, 3))
        #expect(allocator.nextCluster == 70)
        #expect(try allocator.allocate(3) == run(70, 2))
        #expect(allocator.nextCluster == 72)
        // What is left of the range, and the next one.
        #expect(try allocator.allocate(200) == run(84, 200))
        #expect(allocator.nextCluster == 284)
        try allocator.release(run(100, 1))
        #expect(try allocator.count(of: 100) == 0 && allocator.nextCluster == 100)
        // 66 blocks more are made when there is room for less than two requests; they, and a table
        // that is longer by half, take the lowest clusters.
        allocator.nextCluster = 61 * 64 - 3
        #expect(try allocator.allocate(5) == run(62 * 64 + 4, 5))
        // A run ends where a cluster is in use, and where a range waits.
        #expect(try allocator.allocate(64) == run(62 * 64 + 9, 55))
        #expect(try allocator.allocate(64, exactly: true) == nil)
        allocator.nextCluster = 68 * 64 - 2
        #expect(try allocator.allocate(5) == run(68 * 64 - 2, 2))
        #expect(try allocator.allocate(5) == nil)
        #expect(allocator.nextCluster == 68 * 64)
        allocator.nextCluster = 62 * 64
        let frozen = allocator.freeze()
        #expect(frozen.tableOffset == (61 * 64 + 58) * 512 && frozen.tableClusterCount == 3)
        #expect(frozen.movedTable?.count == 1536 && frozen.dropped == [run(4097, 2)])
        #expect(try allocator.allocate(64, exactly: true) == run(68 * 64, 64))
        #expect(allocator.nextCluster == 63 * 64 + 1)
    }

    func writeCount(before moment: Int) -> Int {
        device.moments[..<moment].count { if case .write = $0 { true } else { false } }
    }

    @Test("Who finds no run that is long enough gets blocks for two requests, or for that run")
    func longRuns() throws {
        _ = try allocator.allocate(1)
        #expect(blockCount(allocator.freeze()) == 68)
        // 60 ranges without a break.
        #expect(try allocator.allocate(60 * 64, exactly: true) == run(64, 60 * 64))
        try allocator.free([run(64, 60 * 64)])
        #expect(try allocator.allocate(60 * 64 + 1, exactly: true) == nil)
        #expect(blockCount(allocator.freeze()) == 68 + 66)
        let other = try AllocatorTests().allocator
        _ = try other.allocate(1)
        _ = other.freeze()
        #expect(try other.allocate(6400, exactly: true) == nil)
        #expect(blockCount(other.freeze()) == 68 + 101)
    }

    @Test("Nothing is written over metadata that has no count")
    func metadataWithoutCounts() throws {
        for cluster in [61 * 64, 64 * 64, 64 * 64 + 2] as [UInt64] {
            let parts = try AllocatorTests()
            parts.guarded.add(run(cluster, 1))
            #expect {
                try parts.allocator.allocate(1)
            } throws: { "\($0)".contains("metadata lies at") }
            #expect(parts.device.bytes.count <= Int(cluster) * 512)
        }
    }

    @Test("A table that could not grow is as it was, and grows the next time")
    func failedGrowth() throws {
        let builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: 6)
        // The 64th block, the first one that needs a longer table.
        let device = FaultyDevice(
            RecordingDevice(builder.build(), yielding: false), FaultyDevice.Fault(.write, call: 63))
        let file = try HostFile(device)
        let header = try builder.build().withUnsafeBytes { try Header.parse($0) }
        let map = try ClusterMap(header, in: file, cacheByteCount: 1 << 20)
        let guarded = try MetadataGuard(map: map, tableCount: 8)
        let allocator = try ClusterAllocator(header, in: file, guarded: guarded)
        #expect(try allocator.allocate(1) == nil && device.failed)
        #expect([64 * 64, 64 * 64 + 1].map(guarded.isMetadata) == [false, false])
        #expect(guarded.isMetadata(63 * 64) && guarded.isMetadata(2))
        let frozen = allocator.freeze()
        #expect(frozen.movedTable == nil && frozen.dropped.isEmpty)
        #expect(frozen.pages.pieces.map(\.bytes.count) == [512] && blockCount(frozen) == 64)
        #expect(try allocator.allocate(1).map(\.first).map { $0 > 64 } == true)
        let next = allocator.freeze()
        #expect(next.tableClusterCount == 3 && next.movedTable?.count == 1536)
        #expect(try allocator.count(of: 64 * 64) == 0)
    }

    @Test("A block that cannot count itself is none, and is made the next time")
    func uncountedBlock() throws {
        let builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: 6)
        let bytes = builder.build()
        // The L1 table, the refcount table, the first block, and block 61, which lies in its range.
        let device = FaultyDevice(
            RecordingDevice(bytes, yielding: false), FaultyDevice.Fault(.read, call: 3))
        let file = try HostFile(device)
        let header = try bytes.withUnsafeBytes { try Header.parse($0) }
        let map = try ClusterMap(header, in: file, cacheByteCount: 1 << 20)
        let guarded = try MetadataGuard(map: map, tableCount: 8)
        let allocator = try ClusterAllocator(header, in: file, guarded: guarded)
        #expect(try allocator.allocate(1) == nil && device.failed)
        #expect(!guarded.isMetadata(61 * 64) && guarded.isMetadata(63))
        #expect(blockCount(allocator.freeze()) == 61)
        #expect(try allocator.allocate(1) != nil && allocator.count(of: 61 * 64) == 0)
    }

    @Test("The filter knows every table, and what lies on another")
    func collisions() throws {
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 9, refcountOrder: 6)
        let table = UInt64(builder.entryOffset(0))
        let shared = UInt64(builder.entryOffset(64))
        let l1 = builder.l1Offset
        builder.put(shared | 1 << 63, at: l1 + 16)
        let guarded = try AllocatorTests(builder).guarded
        #expect(!guarded.collides(tableAt: table) && guarded.collides(tableAt: shared))
        #expect(guarded.collides(tableAt: 0) && guarded.collides(tableAt: UInt64(l1)))
        #expect(guarded.isMetadata(table / 512) && guarded.isMetadata(shared / 512))
        #expect(!guarded.collides(tableAt: 1000 * 512))
        guarded.add(run(1000, 2))
        #expect(guarded.collides(tableAt: 1001 * 512) && !guarded.collides(tableAt: 1002 * 512))
        #expect(!guarded.collides(tableAt: 999 * 512) && guarded.collision() == nil)
        for (first, count, found) in [(1001, 1, 1001), (999, 2, 1000), (0, 1, 0), (1, 1, 1)]
            as [(UInt64, UInt64, UInt64)]
        {
            guarded.add(run(first, count))
            #expect(guarded.collision() == found)
            guarded.remove(run(first, count))
            #expect(guarded.collision() == nil)
        }
        for block in [0, 1, 1001] as [UInt64] {
            guarded.addRefcountBlock(block)
            #expect(guarded.collision() == block)
            guarded.removeRefcountBlock(block)
        }
        guarded.addRefcountBlock(1002)
        #expect(guarded.collision() == nil && guarded.isMetadata(1002))
    }

    @Test("Dropping leaves the last reference, freeing takes it")
    func dropping() throws {
        _ = try allocator.allocate(1)
        _ = allocator.freeze()
        _ = try allocator.allocate(8)
        try allocator.raise([run(65, 2), run(66, 1)])
        #expect(try counts(64..<69) == [1, 2, 3, 1, 1])
        #expect(try allocator.drop([run(64, 5)]) == [run(64, 1), run(67, 2)])
        #expect(try counts(64..<69) == [1, 1, 2, 1, 1])
        // What is free already has no reference to lose.
        #expect(try allocator.drop([run(100, 2), run(66, 1)]) == [])
        #expect(try counts(64..<68) == [1, 1, 1, 1])
        try allocator.free([run(67, 2), run(65, 1)])
        #expect(try counts(64..<69) == [1, 0, 1, 0, 0])
        #expect(allocator.nextCluster == 65)
    }

    @Test("References are added to all clusters or to none")
    func raising() throws {
        _ = try allocator.allocate(1)
        _ = allocator.freeze()
        _ = try allocator.allocate(4)
        _ = allocator.takeUnsyncedIncrements()
        #expect(throws: ImageError.self) { try allocator.raise([run(64, 2), run(66, 4)]) }
        #expect(try counts(64..<70) == [1, 1, 1, 1, 0, 0])
        #expect(!allocator.takeUnsyncedIncrements())
        #expect(throws: ImageError.self) { try allocator.checkRaising([run(67, 2)]) }
        #expect(throws: Never.self) { try allocator.checkRaising([run(64, 4)]) }
        try allocator.raise([run(67, 2)], mayBeFree: true)
        #expect(allocator.takeUnsyncedIncrements())
        #expect(try counts(66..<70) == [1, 2, 1, 0])
        #expect(try allocator.haveOneReference([66, 67, 68, 69]) == [true, false, true, false])
    }

    @Test("Narrow counts take no reference too many", arguments: 0...3)
    func narrow(order: Int) throws {
        let parts = try AllocatorTests(
            ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: order))
        let most = UInt64(1) << UInt64(1 << order) - 1
        let cluster = try #require(try parts.allocator.allocate(1)).first
        for _ in 1..<most { try parts.allocator.raise([run(cluster, 1)]) }
        #expect(try parts.allocator.count(of: cluster) == most)
        #expect {
            try parts.allocator.raise([run(cluster, 1)])
        } throws: { "\($0)".contains("have \(1 << order) bits, which is too narrow") }
        #expect(throws: ImageError.self) { try parts.allocator.checkRaising([run(cluster, 1)]) }
        #expect(try parts.allocator.count(of: cluster) == most)
    }

    @Test("Streams lie one behind the other, and reach into the next cluster where it is free")
    func streams() throws {
        // Room for streams is made ahead too.
        #expect(try allocator.allocateStream(100) == nil)
        #expect(blockCount(allocator.freeze()) == 68)
        let start: UInt64 = 64 * 512
        #expect(try allocator.allocateStream(100) == start)
        #expect(try allocator.allocateStream(200) == start + 100)
        #expect(try counts(64..<66) == [2, 0])
        // Into the next one: either cluster has a reference of it.
        #expect(try allocator.allocateStream(300) == start + 300)
        #expect(try counts(64..<67) == [3, 1, 0])
        // To the cluster's last byte; the next one begins another cluster.
        #expect(try allocator.allocateStream(424) == start + 600)
        #expect(try counts(64..<67) == [3, 2, 0])
        #expect(try allocator.allocateStream(511) == start + 1024)
        // One byte of room is too little for two where the next cluster is taken.
        #expect(try allocator.allocate(1) == run(67, 1))
        #expect(try allocator.allocateStream(2) == start + 4 * 512)
        #expect(try counts(64..<70) == [3, 2, 1, 1, 1, 0])
        // A byte of room is enough for one byte.
        #expect(try allocator.allocateStream(509) == start + 4 * 512 + 2)
        #expect(try allocator.allocateStream(1) == start + 4 * 512 + 511)
        #expect(try counts(68..<70) == [3, 0])
        // Whoever gives a stream back ends them; a cluster without any is free.
        try allocator.releaseStream(at: start + 300, 300)
        #expect(try counts(64..<67) == [2, 1, 1])
        #expect(allocator.nextCluster == 69)
        try allocator.releaseStream(at: start + 1024, 511)
        #expect(try counts(64..<67) == [2, 1, 0] && allocator.nextCluster == 66)
        #expect(try allocator.allocateStream(100) == start + 1024)
        // So does who drops or frees the cluster where the last one ends.
        #expect(try allocator.drop([run(66, 1)]) == [run(66, 1)])
        #expect(try allocator.allocateStream(100) == start + 5 * 512)
        try allocator.free([run(69, 1)])
        #expect(try allocator.allocateStream(100) == start + 5 * 512)
        // One that ends with the first byte of a cluster has a reference there.
        #expect(try allocator.allocateStream(413) == start + 5 * 512 + 100)
        #expect(try counts(69..<71) == [2, 1])
        try allocator.releaseStream(at: start + 5 * 512 + 100, 413)
        #expect(try counts(69..<71) == [1, 0])
    }

    @Test("A stream beside another raises a count that its entry must wait for")
    func streamsRaiseCounts() throws {
        _ = try allocator.allocate(1)
        _ = allocator.freeze()
        _ = allocator.takeUnsyncedIncrements()
        for _ in 0..<2 {
            _ = try allocator.allocateStream(100)
            #expect(allocator.takeUnsyncedIncrements())
        }
    }

    @Test("A cluster whose count is full takes no stream more", arguments: [0, 1])
    func fullStreams(order: Int) throws {
        let parts = try AllocatorTests(
            ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: order))
        let most = order == 0 ? 1 : 3
        let first = try #require(try parts.allocator.allocateStream(10))
        for index in 1..<most {
            #expect(try parts.allocator.allocateStream(10) == first + UInt64(index * 10))
        }
        #expect(try parts.allocator.allocateStream(10) == first + 512)
        #expect(try parts.allocator.count(of: first / 512) == UInt64(most))
    }

    @Test("The file is cut behind the last cluster in use")
    func cutting() throws {
        _ = try allocator.allocate(1)
        _ = allocator.freeze()
        _ = try allocator.allocate(4)
        #expect(device.bytes.count > 67 * 64 * 512)
        let end = 67 * 64 + 1
        #expect(device.bytes.count == end * 512)
        try allocator.cutFile()
        #expect(device.bytes.count == end * 512)
        try file.write([1], at: UInt64(end * 512 + 5000))
        try allocator.cutFile()
        #expect(device.bytes.count == end * 512)
        try allocator.free([run(67 * 64, 1), run(66 * 64, 1), run(65 * 64, 1)])
        try allocator.cutFile()
        #expect(device.bytes.count == 4099 * 512)
        // A last cluster that the file has only a part of stays.
        try file.resize(to: 4099 * 512 - 100)
        try allocator.cutFile()
        #expect(device.bytes.count == 4099 * 512 - 100)
    }

    @Test("A cluster that is metadata and has no count is damage")
    func damage() throws {
        var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: 6)
        builder.count(512..<1024, by: ~0)
        let parts = try AllocatorTests(builder)
        #expect {
            try parts.allocator.allocate(1)
        } throws: { "\($0)".contains("the refcount of the metadata at 0x200 is 0") }
    }
}
