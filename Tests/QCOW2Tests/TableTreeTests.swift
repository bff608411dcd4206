import QCOW2
import TestSupport
import Testing

/// The references that tables hold, as a walk over them tells.
@Suite("Walking L2 tables")
struct TableTreeTests {
    let device: RecordingDevice
    let file: HostFile
    let header: Header
    let tables: [UInt64]
    let entries: [L1Entry]

    /// Clusters of 4 KiB; a data cluster, one that is kept, a stream over a border, nothing else.
    init() throws {
        var builder = ImageBuilder(byteCount: 8.MiB, clusterBits: 12)
        let first = builder.entryOffset(0)
        builder.setEntry(100 << 12 | 1 << 63, guestCluster: 0)
        builder.setEntry(101 << 12 | 1 << 63 | 1, guestCluster: 1)
        builder.setEntry(1, guestCluster: 2)
        // A stream of 9 sectors from the middle of cluster 103 on.
        builder.setEntry(1 << 62 | 8 << 58 | (103 << 12 + 2048), guestCluster: 3)
        builder.setEntry(105 << 12, guestCluster: 511)
        let second = builder.entryOffset(512 * 2)
        builder.setEntry(90 << 12 | 1 << 63, guestCluster: 512 * 2 + 5)
        device = RecordingDevice(builder.build(), yielding: false)
        file = try HostFile(device)
        header = try device.bytes.withUnsafeBytes { try Header.parse($0) }
        tables = [UInt64(first) / 4096, UInt64(second) / 4096]
        entries = [first, 0, second, 0].map { L1Entry(bits: UInt64($0)) }
    }

    func run(_ first: UInt64, _ count: UInt64 = 1) -> ClusterRun {
        ClusterRun(first: first, count: count)
    }

    func references(
        _ entries: [L1Entry], header: Header? = nil, _ damage: TableTree.Damage = .refused
    ) throws -> [[ClusterRun]] {
        var found: [[ClusterRun]] = []
        try TableTree(entries, in: file, header: header ?? self.header)
            .forEachReference(damage) { found.append($0) }
        return found
    }

    @Test("Tables, clusters with a place of their own, and all clusters that streams touch")
    func references() throws {
        let expected = [
            run(tables[0]), run(100, 2), run(103, 3), run(tables[1]), run(90),
        ]
        // The stream ends in cluster 104, and 105 follows it.
        #expect(try references(entries) == [expected])
        #expect(try references([]) == [])
        var outside = header
        outside.incompatibleFeatures.insert(.externalDataFile)
        #expect(try references(entries, header: outside) == [[run(tables[0], 2)]])
    }

    @Test("A bad entry ends the walk, or is passed over")
    func damage() throws {
        let place = Int(tables[1]) * 4096 + 9 * 8
        for bits in [91 << 12 | 512, 3 << 62, 1 << 62 | 1 << 57] as [UInt64] {
            var bytes: [UInt8] = []
            bytes.put(bits, at: 0)
            try file.write(bytes, at: UInt64(place))
            #expect(throws: ImageError.self, "\(bits)") { try references(entries) }
            #expect(try references(entries, .ignored).last?.last == run(90), "\(bits)")
        }
        let bad = [L1Entry(bits: tables[0] << 12 | 512), L1Entry(bits: tables[1] << 12)]
        #expect(throws: ImageError.self) { try references(bad) }
        #expect(try references(bad, .ignored) == [[run(tables[1]), run(90)]])
    }

    @Test("Many references come in parts of some thousands, each one once")
    func batches() throws {
        // Full tables of 512 entries, far apart from each other.
        let count = 40
        for table in 0..<count {
            var bytes: [UInt8] = []
            for entry in 0..<512 {
                bytes.put(UInt64(1000 + table * 1000 + entry) << 12, at: entry * 8)
            }
            try file.write(bytes, at: UInt64(500 + table) << 12)
        }
        let found = try references(
            (0..<count).map { L1Entry(bits: UInt64(500 + $0) << 12) })
        let sizes = found.map { $0.reduce(0) { $0 + $1.count } }
        #expect(sizes == [8192, 8192, UInt64(count * 513 - 2 * 8192)])
        let expected = (0..<count).flatMap { table -> [ClusterRun] in
            [run(UInt64(500 + table)), run(UInt64(1000 + table * 1000), 512)]
        }
        var joined: [ClusterRun] = []
        for run in found.joined() { joined.append(joining: run) }
        #expect(joined == expected)
    }

    @Test("Entries without references make no batch, at its start neither")
    func emptyBatches() throws {
        // 15 full tables and one with 496 clusters are 8192 references; zeros follow.
        for table in 0..<16 {
            var bytes: [UInt8] = []
            for entry in 0..<512 {
                let isZero = table == 15 && entry >= 496
                bytes.put(isZero ? 1 : UInt64(1000 + table * 1000 + entry) << 12, at: entry * 8)
            }
            try file.write(bytes, at: UInt64(500 + table) << 12)
        }
        let found = try references((0..<16).map { L1Entry(bits: UInt64(500 + $0) << 12) })
        #expect(found.map { $0.reduce(0) { $0 + $1.count } } == [8192])
    }

    @Test("COPIED goes from every entry that has a cluster, and only then is a table written")
    func clearsCopied() throws {
        let tree = TableTree(entries, in: file, header: header)
        try tree.clearCopied()
        var writes: [Int] = []
        for case .write(_, let offset, _) in device.moments { writes.append(offset / 4096) }
        #expect(writes == tables.map(Int.init))
        func entry(_ table: Int, _ index: Int) -> UInt64 {
            device.bytes.number(at: Int(tables[table]) * 4096 + index * 8, as: UInt64.self)
        }
        #expect(entry(0, 0) == 100 << 12 && entry(0, 1) == 101 << 12 | 1 && entry(0, 2) == 1)
        #expect(entry(0, 3) == 1 << 62 | 8 << 58 | (103 << 12 + 2048))
        #expect(entry(0, 511) == 105 << 12 && entry(1, 5) == 90 << 12)
        try tree.clearCopied()
        #expect(device.moments.count { if case .write = $0 { true } else { false } } == 2)
    }

    @Test("A snapshot's L1 table is read as far as it goes or is wanted, without COPIED")
    func snapshotTable() throws {
        var bytes: [UInt8] = []
        for (index, entry) in entries.enumerated() {
            bytes.put(entry.bits | 1 << 63, at: index * 8)
        }
        try file.write(bytes, at: 200 << 12)
        var snapshot = Snapshot(id: "1", name: "a", seconds: 0, nanoseconds: 0, diskByteCount: 0)
        snapshot.l1Offset = 200 << 12
        snapshot.l1EntryCount = 4
        func read(_ limit: UInt64 = .max) throws -> [L1Entry] {
            try TableTree.l1Entries(of: snapshot, in: file, header: header, limit: limit)
        }
        #expect(try read() == entries && read(3) == Array(entries.prefix(3)))
        #expect(try read(4) == entries && read(0) == [] && read(1) == [entries[0]])
        snapshot.l1Offset += 8
        #expect(throws: ImageError.self) { try read() }
        snapshot.l1EntryCount = 0
        snapshot.l1Offset = 0
        #expect(try read() == [])
    }
}
