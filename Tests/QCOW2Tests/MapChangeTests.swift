import QCOW2
import TestSupport
import Testing

/// What a change of the map leaves for the commit: tables, references that are gone, and whether
/// data must be there first.
@Suite("Changes of the cluster map")
struct MapChangeTests {
    let map: ClusterMap
    let table: UInt64
    let data: UInt64

    /// Clusters of 512 bytes: a table has 64 entries.  Guest clusters 0 to 3 and one in table 4
    /// have data, all in one piece.
    init() throws {
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 9)
        table = UInt64(builder.entryOffset(0))
        data = UInt64(builder.fill(1, guestCluster: 0)) / 512
        for cluster in 1...3 { builder.fill(1, guestCluster: cluster) }
        builder.fill(1, guestCluster: 4 * 64)
        map = try Self.map(builder)
    }

    static func map(_ builder: ImageBuilder, cacheByteCount: Int = 1 << 20) throws -> ClusterMap {
        let bytes = builder.build()
        let header = try bytes.withUnsafeBytes { try Header.parse($0) }
        return try ClusterMap(
            header, in: HostFile(RecordingDevice(bytes, yielding: false)),
            cacheByteCount: cacheByteCount)
    }

    func run(_ first: UInt64, _ count: UInt64) -> ClusterRun {
        ClusterRun(first: first, count: count)
    }

    func freeze(_ map: ClusterMap) -> FrozenMap {
        defer { map.thaw() }
        return map.freeze { $0 }
    }

    func entry(_ cluster: UInt64) -> L2Entry { L2Entry(copiedClusterAt: cluster * 512) }

    @Test("Entries change one by one, and their slice is written whole")
    func update() throws {
        #expect(!map.isDirty)
        var seen: [L2Entry] = []
        let count = try map.update(1, count: 3) { index, old in
            seen.append(old)
            return index == 1 ? old : entry(1000 + UInt64(index))
        }
        #expect(count == 3 && seen == (1...3).map { entry(data + $0) })
        #expect(map.isDirty)
        let frozen = freeze(map)
        #expect(!map.isDirty)
        let piece = try #require(frozen.tables.pieces.first)
        #expect(frozen.tables.pieces.count == 1 && piece.offset == table)
        #expect(piece.bytes.count == 512)
        let bits = (0..<5).map { piece.bytes.number(at: $0 * 8, as: UInt64.self) }
        #expect(bits == [data, 1000, data + 2, 1002].map { entry($0).bits } + [0])
        #expect(frozen.dropped == [run(data + 1, 1), run(data + 3, 1)])
        #expect(frozen.exposesData && frozen.movedL1Table == nil)
        // What is the same already is no change.
        _ = try map.update(0, count: 64) { _, old in old }
        #expect(!map.isDirty)
        let nothing = freeze(map)
        #expect(nothing.tables.isEmpty && nothing.dropped.isEmpty && !nothing.exposesData)
    }

    @Test("Only what shows data, or has a new cluster, must wait for what is in it")
    func exposure() throws {
        let own = entry(2000)
        let stream = L2Entry(bits: 1 << 62 | 2001 * 512)
        let cases: [(L2Entry, L2Entry, exposes: Bool, dropped: [ClusterRun])] = [
            (.unallocated, own, true, []),
            (own, .unallocated, false, [run(2000, 1)]),
            (.unallocated, .zeroPlain, false, []),
            (.unallocated, own.withZeroFlag, true, []),
            (own.withZeroFlag, own, true, []),
            (own, own.withZeroFlag, false, []),
            (own, own.withoutCopied, true, []),
            (own.withZeroFlag, own.withZeroFlag.withoutCopied, false, []),
            (own, .zeroPlain, false, [run(2000, 1)]),
            (own, entry(2002), true, [run(2000, 1)]),
            (own, stream, true, [run(2000, 1)]),
            (stream, own, true, [run(2001, 1)]),
            (stream, .unallocated, false, [run(2001, 1)]),
            (stream, L2Entry(bits: stream.bits + 1), true, [run(2001, 1)]),
        ]
        _ = try map.update(20, count: 1) { _, _ in .zeroPlain }
        #expect(!freeze(map).exposesData)
        for (old, new, exposes, dropped) in cases {
            _ = try map.update(20, count: 1) { _, _ in old }
            _ = freeze(map)
            _ = try map.update(20, count: 1) { _, _ in new }
            let frozen = freeze(map)
            let what = "\(old.bits) to \(new.bits)"
            #expect(frozen.exposesData == exposes, "\(what)")
            #expect(frozen.dropped == dropped, "\(what)")
        }
    }

    @Test("Of extended entries, those that show more subclusters")
    func extendedExposure() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 14, isExtended: true)
        builder.fill(1, guestCluster: 0)
        let map = try Self.map(builder)
        func entry(_ allocated: UInt32, _ zero: UInt32) -> L2Entry {
            L2Entry(
                bits: 1 << 63 | 1 << 20,
                subclusters: SubclusterBitmap(allocated: allocated, zero: zero))
        }
        for (old, new, exposes) in [
            (entry(1, 0), entry(3, 0), true), (entry(3, 0), entry(1, 0), false),
            (entry(1, 0), entry(1, 2), false), (entry(1, 2), entry(3, 0), true),
            (entry(1, 0), entry(2, 0), true), (.unallocated, entry(0, 1), true),
        ] as [(L2Entry, L2Entry, Bool)] {
            _ = try map.update(5, count: 1) { _, _ in old }
            _ = freeze(map)
            _ = try map.update(5, count: 1) { _, _ in new }
            #expect(freeze(map).exposesData == exposes, "\(old) to \(new)")
        }
    }

    @Test("Slices that follow each other are one write, wherever the change began")
    func slices() throws {
        var builder = ImageBuilder(byteCount: 512.MiB)
        let table = UInt64(builder.entryOffset(0))
        let map = try Self.map(builder)
        #expect(try map.update(510, count: 4) { index, _ in entry(UInt64(index + 1) * 128) } == 4)
        var pieces = freeze(map).tables.pieces
        #expect(pieces.map(\.offset) == [table] && pieces.map(\.bytes.count) == [8192])
        let bits = (510..<514).map { pieces[0].bytes.number(at: $0 * 8, as: UInt64.self) }
        #expect(bits == (1...4).map { entry($0 * 128).bits })
        #expect(try map.update(8191, count: 1) { _, _ in .zeroPlain } == 1)
        pieces = freeze(map).tables.pieces
        #expect(pieces.map(\.offset) == [table + 61440] && pieces.map(\.bytes.count) == [4096])
        #expect(pieces[0].bytes.number(at: 4088, as: UInt64.self) == 1)
        let entries = try #require(try map.entries(ofSliceAt: 512))
        #expect(entries.count == 512 && entries[1] == entry(512) && entries[2] == .unallocated)
    }

    @Test("A new table takes the place of another, which loses its reference")
    func replacedTable() throws {
        #expect(map.hasWritableTable(at: 0) && !map.hasWritableTable(at: 32768))
        map.replaceTable(0, by: 0x8000, clearingCopied: false)
        map.replaceTable(1, by: 0x8200, clearingCopied: false)
        #expect(map.hasWritableTable(at: 32767) && map.hasWritableTable(at: 32768))
        #expect(map.isDirty)
        let frozen = freeze(map)
        #expect(frozen.dropped == [run(table / 512, 1)] && frozen.exposesData)
        #expect(frozen.tables.pieces.map(\.offset) == [512])
        let piece = frozen.tables.pieces[0].bytes
        #expect(piece.count == 64)
        #expect(piece.number(at: 0, as: UInt64.self) == L1Entry(copiedTableAt: 0x8000).bits)
        #expect(piece.number(at: 8, as: UInt64.self) == L1Entry(copiedTableAt: 0x8200).bits)
        #expect(piece.number(at: 16, as: UInt64.self) == 0)
    }

    @Test("The copy of a shared table has no COPIED, in memory too")
    func clearedCopies() throws {
        _ = try map.update(5, count: 1) { _, _ in L2Entry(bits: 1 << 62 | 4096) }
        #expect(try map.extent(at: 0, limit: 512).isCopied)
        map.replaceTable(0, by: 0x8000, clearingCopied: true)
        #expect(try !map.extent(at: 0, limit: 512).isCopied)
        let entries = try #require(try map.entries(ofSliceAt: 0))
        #expect(entries.prefix(4) == (0...3).map { entry(data + $0).withoutCopied }[...])
        #expect(entries[5].bits == 1 << 62 | 4096)
    }

    @Test("The parts of a long L1 table that changed are written, 4 KiB each")
    func l1Pages() throws {
        let builder = ImageBuilder(byteCount: 32.KiB * 1100, clusterBits: 9)
        let map = try Self.map(builder)
        for index in [1099, 512] { map.replaceTable(index, by: 0x10_0000, clearingCopied: false) }
        let pieces = freeze(map).tables.pieces
        // Neighbours: one write of 512 and of 76 entries.
        #expect(pieces.map(\.offset) == [512 + 4096] && pieces.map(\.bytes.count) == [4096 + 608])
        #expect(
            pieces[0].bytes.number(at: 0, as: UInt64.self) == L1Entry(copiedTableAt: 0x10_0000).bits
        )
        #expect(
            pieces[0].bytes.number(at: 587 * 8, as: UInt64.self)
                == L1Entry(copiedTableAt: 0x10_0000).bits)
        map.setCopied(false, ofTable: 512)
        #expect(map.l1Entry(512).bits == 0x10_0000)
        #expect(freeze(map).tables.pieces.map(\.offset) == [512 + 4096])
        map.setCopied(false, ofTable: 512)
        #expect(!map.isDirty)
        map.setCopied(true, ofTable: 512)
        #expect(map.isDirty && map.l1Entry(512).bits == L1Entry(copiedTableAt: 0x10_0000).bits)
        _ = freeze(map)
        map.clearCopiedOfTables()
        #expect(map.l1Entry(512).bits == 0x10_0000 && map.l1Entry(1099).bits == 0x10_0000)
        #expect(freeze(map).tables.pieces.map(\.bytes.count) == [4096 + 608])
        map.clearCopiedOfTables()
        #expect(!map.isDirty)
    }

    @Test("Tables past the disk's end go with their slices, changed or not")
    func removedTables() throws {
        _ = try map.update(4 * 64 + 1, count: 1) { _, _ in entry(3000) }
        _ = try map.update(0, count: 1) { _, _ in entry(3001) }
        map.removeTables(from: 4, dropping: [run(7, 1), run(8, 1), run(20, 1)])
        #expect(map.l1Entry(4).bits == 0 && map.l1Entry(0).offset == table)
        #expect(
            try map.extent(at: 4 * 32768, limit: 131_072)
                == Extent(.unallocated, byteCount: 131_072))
        let frozen = freeze(map)
        #expect(frozen.tables.pieces.map(\.offset).sorted() == [512, table])
        #expect(frozen.dropped == [run(data, 1), run(7, 2), run(20, 1)])
        map.removeTables(from: 8, dropping: [])
        #expect(!map.isDirty)
        // Their slots are free again, however often.
        for number in 0..<40 as Range<UInt64> {
            map.replaceTable(4, by: 0x8000, clearingCopied: false)
            #expect(try map.update(4 * 64, count: 1) { _, _ in entry(3000 + number) } == 1)
            map.removeTables(from: 4, dropping: [])
        }
        map.replaceTable(4, by: 0x8000, clearingCopied: false)
        #expect(try map.update(4 * 64, count: 1) { _, _ in entry(4000) } == 1)
        #expect(freeze(map).tables.pieces.map(\.offset).sorted() == [512, 0x8000])
    }

    @Test(
        "A moved L1 table is written whole, and the old one loses its clusters",
        arguments: [3, 8, 200])
    func movedTable(count: Int) throws {
        map.replaceTable(7, by: 0x8000, clearingCopied: false)
        _ = freeze(map)
        let before = map.l1Entries()
        try map.moveL1Table(to: 0x9000, count: count)
        #expect(map.isDirty && map.l1EntryCount == count && map.l1Offset == 0x9000)
        let expected = Array(
            (before + Array(repeating: L1Entry(bits: 0), count: 200)).prefix(count))
        #expect(map.l1Entries() == expected)
        let frozen = freeze(map)
        #expect(frozen.l1Offset == 0x9000 && frozen.dropped == [run(1, 1)])
        let moved = try #require(frozen.movedL1Table)
        #expect(moved.count == count * 8 && frozen.tables.isEmpty)
        for (index, entry) in expected.enumerated() {
            #expect(moved.number(at: index * 8, as: UInt64.self) == entry.bits)
        }
        #expect(!map.isDirty && freeze(map).movedL1Table == nil)
        #expect(map.l1Clusters == run(0x9000 / 512, UInt64((count * 8 + 511) / 512)))
    }

    @Test("Another L1 table shows other tables at once")
    func replacedL1() throws {
        #expect(try map.extent(at: 0, limit: 512).kind == .data)
        let other = L1Entry(copiedTableAt: map.l1Entry(4).offset)
        try map.replaceL1Table(by: [L1Entry(bits: 0), other], at: 0xa000)
        #expect(map.l1EntryCount == 2 && map.l1Offset == 0xa000 && map.isDirty)
        #expect(try map.extent(at: 0, limit: 512).kind == .unallocated)
        #expect(try map.extent(at: 32768, limit: 512).kind == .data)
        let frozen = freeze(map)
        #expect(frozen.dropped == [run(1, 1)] && frozen.movedL1Table?.count == 16)
        #expect(frozen.l1Offset == 0xa000 && frozen.tables.isEmpty)
    }

    @Test("Dropped references are joined, and make the map dirty by themselves")
    func dropping() {
        map.drop([run(5, 1), run(6, 2), run(8, 1), run(5, 1)])
        #expect(map.isDirty)
        #expect(freeze(map).dropped == [run(5, 4), run(5, 1)])
        #expect(!map.isDirty)
    }

    @Test("What is dirty and dropped has a measure, half of it for who makes much")
    func measures() throws {
        var builder = ImageBuilder(byteCount: 32.KiB * 64, clusterBits: 9)
        let host = UInt64(builder.fill(1, guestCluster: 63 * 64 + 5))
        let map = try Self.map(builder, cacheByteCount: 0)
        for index in 0..<63 {
            map.replaceTable(index, by: 0x10_0000 + UInt64(index) * 512, clearingCopied: false)
        }
        _ = freeze(map)
        // Sixteen slots: a quarter of them, and an eighth.
        var isHalf: [Bool] = []
        var isFull: [Bool] = []
        for index in 0..<6 as Range<UInt64> {
            #expect(try map.update(index * 64, count: 1) { _, _ in .zeroPlain } == 1)
            isHalf.append(map.isHalfFull)
            isFull.append(map.isOverfull)
        }
        #expect(isHalf == [false, false, true, true, true, true])
        #expect(isFull == [false, false, false, false, true, true])
        // Where every way of a set is dirty, or waits for a commit's end, nothing more goes in.
        var done = 0
        for index in 6..<64 as Range<UInt64> {
            done += try map.update(index * 64, count: 1) { _, _ in .zeroPlain }
        }
        #expect(done == 10)
        _ = map.freeze { $0 }
        #expect(try map.update(63 * 64, count: 1) { _, _ in .zeroPlain } == 0)
        #expect(try map.entries(ofSliceAt: 63 * 64) == nil)
        #expect(
            try map.extent(at: 63 * 32768 + 512, limit: 99_999)
                == Extent(.unallocated, host: 0, byteCount: 4 * 512))
        #expect(
            try map.extent(at: 63 * 32768 + 5 * 512, limit: 99_999)
                == Extent(.data, isCopied: true, host: host, byteCount: 512))
        map.thaw()
        #expect(try map.update(63 * 64, count: 1) { _, _ in .zeroPlain } == 1)
    }

    @Test("An entry whose slice finds no room in memory is the file's")
    func storedEntry() throws {
        // A table of 1024 entries in four slices of 4 KiB.
        var builder = ImageBuilder(byteCount: 16.MiB * 8, clusterBits: 14, isExtended: true)
        let last = 31 * 256 + 5
        let host = UInt64(builder.fill(1, guestCluster: last))
        builder.setBitmap(0xf0f0 << 32 | 0x0f0f, guestCluster: last)
        for table in 0..<7 { builder.fill(1, guestCluster: table * 1024) }
        let map = try Self.map(builder, cacheByteCount: 0)
        var done = 0
        for slice in 0..<31 as Range<UInt64> {
            done += try map.update(slice * 256 + 1, count: 1) { _, _ in .zeroPlain }
        }
        #expect(done == 16)
        #expect(try map.update(UInt64(last), count: 1) { _, _ in .zeroPlain } == 0)
        let entry = try map.entry(of: UInt64(last))
        #expect(entry.bits == host | 1 << 63)
        #expect(entry.subclusters.bits == 0xf0f0 << 32 | 0x0f0f)
        #expect(try map.entry(of: UInt64(last) + 1) == .unallocated)
    }

    @Test("Of a large cache, two thousand slices at most")
    func largeCache() throws {
        let tables = 16400
        let builder = ImageBuilder(byteCount: 2.MiB * tables, clusterBits: 12)
        let map = try Self.map(builder, cacheByteCount: 64 << 20)
        for index in 0..<tables {
            map.replaceTable(index, by: 0x1000_0000 + UInt64(index) << 12, clearingCopied: false)
        }
        _ = freeze(map)
        var half = 0
        var full = 0
        for index in 0..<2100 {
            guard try map.update(UInt64(index) * 512, count: 1, { _, _ in .zeroPlain }) == 1 else {
                continue
            }
            if !map.isHalfFull { half += 1 }
            if !map.isOverfull { full += 1 }
        }
        #expect(half == 1024 && full == 2048)
    }

    @Test("Many dropped references are a measure too")
    func manyDropped() {
        func drop(_ count: UInt64) { map.drop((0..<count).map { run($0 * 2, 1) }) }
        drop(1 << 15)
        #expect(!map.isHalfFull)
        drop(1)
        #expect(map.isHalfFull && !map.isOverfull)
        drop((1 << 15) - 1)
        #expect(!map.isOverfull)
        drop(1)
        #expect(map.isOverfull)
    }
}
