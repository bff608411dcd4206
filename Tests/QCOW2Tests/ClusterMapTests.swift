import Glibc
import QCOW2
import Synchronization
import TestSupport
import Testing

/// What the tables say of guest ranges, to the byte.
@Suite("Runs of the cluster map")
struct ClusterMapTests {
    func map(_ builder: ImageBuilder, change: (inout [UInt8]) -> Void = { _ in }) throws
        -> ClusterMap
    {
        var bytes = builder.build()
        change(&bytes)
        let header = try bytes.withUnsafeBytes { try Header.parse($0) }
        return try ClusterMap(
            header, in: HostFile(RecordingDevice(bytes, yielding: false)), cacheByteCount: 1 << 20)
    }

    /// Clusters of 512 bytes: a table describes 32 KiB, and there are eight.
    @Test("Entries of one kind that follow each other are one run")
    func standardEntries() throws {
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 9)
        let data = UInt64(builder.fill(1, guestCluster: 0))
        for cluster in 1...3 { builder.fill(1, guestCluster: cluster) }
        for cluster in 4...5 { builder.zero(guestCluster: cluster) }
        let zeros = UInt64(builder.zeroAllocated(guestCluster: 6))
        _ = builder.allocate(byteCount: 512)
        builder.zeroAllocated(guestCluster: 7)
        builder.compress([UInt8](repeating: 3, count: 512), guestCluster: 8)
        builder.fill(1, guestCluster: 9)
        let later = UInt64(builder.fill(1, guestCluster: 10))
        builder.setEntry(later + 512, guestCluster: 11)
        // Compressed and COPIED at once.
        builder.setEntry(3 << 62 | 7, guestCluster: 12)
        let last = UInt64(builder.fill(1, guestCluster: 5 * 64 + 63))
        let map = try map(builder)
        func expect(
            _ guest: UInt64, _ limit: UInt64, _ extent: Extent,
            sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            let found = try map.extent(at: guest, limit: limit)
            #expect(found == extent, sourceLocation: sourceLocation)
        }
        let all: UInt64 = 262_144
        try expect(0, all, Extent(.data, isCopied: true, host: data, byteCount: 2048))
        try expect(0, 2047, Extent(.data, isCopied: true, host: data, byteCount: 2047))
        try expect(700, all, Extent(.data, isCopied: true, host: data + 700, byteCount: 1348))
        try expect(700, 5, Extent(.data, isCopied: true, host: data + 700, byteCount: 5))
        try expect(2048, all, Extent(.zeroPlain, byteCount: 1024))
        try expect(2049, all, Extent(.zeroPlain, host: 1, byteCount: 1023))
        try expect(3072, all, Extent(.zeroAllocated, isCopied: true, host: zeros, byteCount: 1024))
        let stream = try map.extent(at: 4096 + 10, limit: all)
        #expect(stream.kind == .compressed && stream.byteCount == 502 && !stream.isCopied)
        #expect(stream.host >> 62 == 1)
        try expect(4096 + 10, 3, Extent(.compressed, host: stream.host, byteCount: 3))
        try expect(
            9 * 512, all, Extent(.data, isCopied: true, host: later - 512, byteCount: 1024))
        try expect(11 * 512, all, Extent(.data, host: later + 512, byteCount: 512))
        try expect(12 * 512, all, Extent(.corrupt, host: 3 << 62 | 7, byteCount: 512))
        try expect(12 * 512 + 500, 100, Extent(.corrupt, host: 3 << 62 | 7, byteCount: 12))
        // Nothing, as far as the table goes; and where there is no table, up to the next one.
        try expect(13 * 512, all, Extent(.unallocated, byteCount: 51 * 512))
        try expect(13 * 512 + 1, all, Extent(.unallocated, host: 1, byteCount: 51 * 512 - 1))
        try expect(32768 + 1000, all, Extent(.unallocated, byteCount: 4 * 32768 - 1000))
        try expect(32768, 70_000, Extent(.unallocated, byteCount: 70_000))
        try expect(4 * 32768 + 100, all, Extent(.unallocated, byteCount: 32668))
        try expect(5 * 32768, all, Extent(.unallocated, byteCount: 63 * 512))
        try expect(6 * 32768 - 512, all, Extent(.data, isCopied: true, host: last, byteCount: 512))
        try expect(6 * 32768 + 5, 65531, Extent(.unallocated, byteCount: 65531))
        try expect(8 * 32768, 99, Extent(.unallocated, byteCount: 99))
    }

    @Test("A table at no cluster's start is damage as far as it would describe the disk")
    func badTable() throws {
        var builder = ImageBuilder(byteCount: 4.MiB, clusterBits: 12)
        builder.fill(1, guestCluster: 0)
        builder.fill(1, guestCluster: 512)
        let l1 = builder.l1Offset
        let map = try map(builder) { $0.put(8192 + 512 | UInt64(1) << 63, at: l1) }
        let entry = map.l1Entry(0).bits
        #expect(
            try map.extent(at: 1000, limit: 4 << 20)
                == Extent(.corrupt, host: entry, byteCount: 2 << 20 - 1000))
        #expect(
            try map.extent(at: 1000, limit: 10) == Extent(.corrupt, host: entry, byteCount: 10))
        #expect(try map.extent(at: 2 << 20, limit: 512).kind == .data)
    }

    /// Clusters of 16 KiB with subclusters of 512 bytes.
    @Test("So are subclusters, over the ends of clusters that follow each other")
    func subclusters() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 14, isExtended: true)
        let host = UInt64(builder.fill(1, guestCluster: 0))
        for cluster in 1...3 { builder.fill(1, guestCluster: cluster) }
        builder.setBitmap(0xffff_fff0, guestCluster: 0)
        builder.setBitmap(0x0000_000f | 0xff00 << 32, guestCluster: 2)
        builder.setBitmap(0xffff_ffff << 32, guestCluster: 4)
        builder.setBitmap(1 << 32, guestCluster: 5)
        builder.setBitmap(1 << 3 | 1 << 35, guestCluster: 6)
        let map = try map(builder)
        func reserved(_ host: UInt64, _ byteCount: UInt64) -> Extent {
            var extent = Extent(.unallocated, isCopied: true, host: host, byteCount: byteCount)
            extent.isReserved = true
            return extent
        }
        func expect(
            _ guest: UInt64, _ extent: Extent, limit: UInt64 = 1 << 24,
            sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            let found = try map.extent(at: guest, limit: limit)
            #expect(found == extent, sourceLocation: sourceLocation)
        }
        let cluster: UInt64 = 16384
        try expect(0, reserved(host, 2048))
        try expect(600, reserved(host + 600, 1448))
        try expect(600, reserved(host + 600, 7), limit: 7)
        try expect(
            2048, Extent(.data, isCopied: true, host: host + 2048, byteCount: 2 * cluster))
        try expect(
            2148, Extent(.data, isCopied: true, host: host + 2148, byteCount: 2 * cluster - 100))
        try expect(
            2048, Extent(.data, isCopied: true, host: host + 2048, byteCount: cluster + 1),
            limit: cluster + 1)
        try expect(2 * cluster + 2048, reserved(host + 2 * cluster + 2048, 2048))
        try expect(
            2 * cluster + 4096,
            Extent(.zeroAllocated, isCopied: true, host: host + 2 * cluster + 4096, byteCount: 4096)
        )
        try expect(2 * cluster + 8192, reserved(host + 2 * cluster + 8192, 8192))
        try expect(4 * cluster, Extent(.zeroPlain, byteCount: cluster + 512))
        try expect(5 * cluster + 512, Extent(.unallocated, byteCount: cluster - 512))
        let bad = try map.extent(at: 6 * cluster + 100, limit: 1 << 20)
        #expect(bad == Extent(.corrupt, host: 0, byteCount: cluster - 100))
        try expect(7 * cluster, Extent(.unallocated, byteCount: 249 * cluster))
    }

    @Test("A slice that two threads ask for is read once")
    func sharedLoad() throws {
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 9)
        let table = UInt64(builder.entryOffset(0))
        let bytes = builder.build()
        let header = try bytes.withUnsafeBytes { try Header.parse($0) }
        let device = SlowTableDevice(RecordingDevice(bytes, yielding: false), table: table)
        let map = try ClusterMap(header, in: HostFile(device), cacheByteCount: 1 << 20)
        try onThreads(2) { _ in _ = try map.extent(at: 0, limit: 512) }
        #expect(device.readCount == 1)
    }

    @Test("In a data file each cluster has its place, and none is compressed")
    func subclustersOfADataFile() throws {
        let cluster: UInt64 = 16384
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 14, isExtended: true)
        builder.incompatibleFeatures |= 4
        for (guest, entry) in [
            (2, 2 * cluster | 1 << 63), (3, 3 * cluster | 1 << 63), (5, 6 * cluster | 1 << 63),
            (7, 7 * cluster | 1 << 62),
        ] as [(Int, UInt64)] {
            builder.setEntry(entry, guestCluster: guest)
            builder.setBitmap(0xffff_ffff, guestCluster: guest)
        }
        let map = try map(builder)
        for into in [0, 512, 700] as [UInt64] {
            let data = try map.extent(at: 2 * cluster + into, limit: 1 << 20)
            let place = 2 * cluster + into
            #expect(
                data == Extent(.data, isCopied: true, host: place, byteCount: 2 * cluster - into))
            #expect(try map.extent(at: 5 * cluster + into, limit: 1 << 20).kind == .corrupt)
            #expect(try map.extent(at: 7 * cluster + into, limit: 1 << 20).kind == .corrupt)
            #expect(try map.extent(at: 8 * cluster + into, limit: 1 << 20).kind == .unallocated)
        }
    }

    @Test("A map knows how many tables and slices there are, and where its own table lies")
    func shape() throws {
        var builder = ImageBuilder(byteCount: 64.MiB, clusterBits: 16, extraL1Entries: 9000)
        builder.fill(1, guestCluster: 0)
        let map = try map(builder)
        #expect(map.l1EntryCount == 9001 && map.coverageBits == 29)
        #expect(map.tableClusterCount == 8192 && map.sliceClusterCount == 512)
        #expect(map.l1Clusters == ClusterRun(first: 1, count: 2) && map.l1Offset == 65536)
        #expect(map.nextTable(from: 0) == 0 && map.nextTable(from: 1) == 9001)
        #expect(map.hasWritableTable(at: 0) && !map.hasWritableTable(at: 1 << 29))
        #expect(!map.hasWritableTable(at: 9001 << 29))
        #expect(
            map.l1Entries().map(\.bits) == [map.l1Entry(0).bits] + Array(repeating: 0, count: 9000))
        #expect(!map.isDirty && !map.isOverfull && !map.isHalfFull)
    }
}

/// A device that takes its time to read one table.
private final class SlowTableDevice: ForwardingDevice {
    let base: any BlockDevice
    private let table: UInt64
    private let reads = Atomic(0)

    init(_ base: any BlockDevice, table: UInt64) { (self.base, self.table) = (base, table) }

    var readCount: Int { reads.load(ordering: .relaxed) }

    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        if offset == table {
            reads.add(1, ordering: .relaxed)
            usleep(100_000)
        }
        return try base.read(into: buffer, at: offset)
    }
}
