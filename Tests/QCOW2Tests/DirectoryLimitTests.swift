import QCOW2
import TestSupport
import Testing

/// The tables with entries of any length: bitmap directory and snapshot table, byte by byte.
@Suite("Directories of bitmaps and snapshots")
struct DirectoryLimitTests {
    static let hostEnd: UInt64 = 1 << 56

    // MARK: Bitmaps

    /// 40 bytes: a table at 0x11223344550000, flags 5, a name of 6 bytes, extra data of 3.
    static let entryBytes: [UInt8] =
        [0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0, 0, 0, 0, 0x12, 0x34, 0, 0, 0, 5, 1, 16]
        + [0, 6, 0, 0, 0, 3, 9, 8, 7] + Array("tracks".utf8) + [0, 0, 0, 0, 0, 0, 0]

    func entry(_ change: (inout BitmapEntry) -> Void = { _ in }) throws -> BitmapEntry {
        var entry = try #require(try parse(Self.entryBytes, count: 1).first)
        change(&entry)
        return entry
    }

    func parse(
        _ bytes: [UInt8], count: Int, clusterByteCount: UInt64 = 65536
    ) throws(FormatError) -> [BitmapEntry] {
        try bytes.withUnsafeBytes { raw in
            Result { () throws(FormatError) in
                try BitmapEntry.parseDirectory(
                    raw, count: count, clusterByteCount: clusterByteCount)
            }
        }.get()
    }

    func expect(
        _ error: FormatError?, _ bytes: [UInt8], count: Int = 1, clusterByteCount: UInt64 = 65536,
        sourceLocation: SourceLocation = #_sourceLocation
    ) {
        do throws(FormatError) {
            _ = try parse(bytes, count: count, clusterByteCount: clusterByteCount)
            #expect(error == nil, sourceLocation: sourceLocation)
        } catch let found {
            #expect(found == error, sourceLocation: sourceLocation)
        }
    }

    @Test("A bitmap's entry, field by field")
    func bitmapFields() throws {
        let first = try entry()
        #expect(first.tableOffset == 0x0011_2233_4455_0000 && first.tableEntryCount == 0x1234)
        #expect(first.flags == 5 && first.type == 1 && first.granularityBits == 16)
        #expect(first.name == "tracks" && first.extraData == [9, 8, 7])
        #expect(first.directoryOffset == 0)
        #expect(BitmapEntry.encodeDirectory([first]) == Self.entryBytes)
        let second = try entry {
            $0.nameBytes = [0xff]
            $0.extraData = []
            $0.directoryOffset = 40
        }
        let both = BitmapEntry.encodeDirectory([first, second])
        #expect(both.count == 72)
        #expect(try parse(both, count: 2) == [first, second])
        #expect(try parse([], count: 0) == [])
    }

    @Test("A directory has its entries and nothing else")
    func bitmapDirectory() {
        let bytes = Self.entryBytes
        for found in [0, 23] {
            expect(
                .truncated("bitmap directory", needed: 24, found: UInt64(found)),
                Array(bytes.prefix(found)))
        }
        for found in [24, 32] {
            expect(
                .truncated("bitmap directory", needed: 33, found: UInt64(found)),
                Array(bytes.prefix(found)))
        }
        for count in [39, 41] {
            expect(
                .inconsistent("the bitmap directory has \(count) bytes, its entries 40"),
                Array((bytes + [0]).prefix(count)))
        }
        expect(.truncated("bitmap directory", needed: 64, found: 40), bytes, count: 2)
        expect(.inconsistent("two bitmaps are named 'tracks'"), bytes + bytes, count: 2)
    }

    @Test("Names, grains and tables of bitmaps stay within their limits")
    func bitmapLimits() throws {
        func expect(
            _ error: FormatError?, clusterByteCount: UInt64 = 65536,
            _ change: (inout BitmapEntry) -> Void
        ) throws {
            self.expect(
                error, BitmapEntry.encodeDirectory([try entry(change)]),
                clusterByteCount: clusterByteCount)
        }
        for length in [1, 1023] {
            try expect(nil) { $0.nameBytes = [UInt8](repeating: 0x61, count: length) }
        }
        for length in [0, 1024] {
            try expect(
                .outOfRange(
                    "length of a bitmap's name", value: UInt64(length), allowed: "1 to 1023")
            ) { $0.nameBytes = [UInt8](repeating: 0x61, count: length) }
        }
        for bits: UInt8 in [9, 31] { try expect(nil) { $0.granularityBits = bits } }
        for bits: UInt8 in [8, 32] {
            try expect(
                .outOfRange(
                    "granularity bits of bitmap 'tracks'", value: UInt64(bits), allowed: "9 to 31")
            ) { $0.granularityBits = bits }
        }
        let table = "table of bitmap 'tracks'"
        try expect(nil) { $0.tableOffset = Self.hostEnd - 65536 }
        for offset in [0, 65544, Self.hostEnd] {
            try expect(.misaligned(table, offset: offset, alignment: 65536)) {
                $0.tableOffset = offset
            }
        }
        for clusterBits: UInt64 in [9, 16, 21] {
            let most = UInt32((512 << 20) >> clusterBits)
            let clusterByteCount = UInt64(1) << clusterBits
            let offset = UInt64(1) << 30
            try expect(nil, clusterByteCount: clusterByteCount) {
                $0.tableOffset = offset
                $0.tableEntryCount = most
            }
            try expect(
                .tooLarge(table, value: UInt64(most) + 1, limit: UInt64(most)),
                clusterByteCount: clusterByteCount
            ) {
                $0.tableOffset = offset
                $0.tableEntryCount = most + 1
            }
        }
    }

    @Test("A bitmap has a bit for each granule, a table entry for each cluster of bits")
    func bitmapSizes() {
        // A cluster of 512 bytes has bits for 4096 granules: 2 MiB of a disk.
        for (disk, count) in [(0, 0), (1, 1), (2 << 20, 1), (2 << 20 + 1, 2), (5 << 20, 3)]
            as [(UInt64, UInt64)]
        {
            #expect(
                BitmapEntry.tableEntryCount(
                    diskByteCount: disk, granularityBits: 9, clusterBits: 9) == count)
        }
        // 512 MiB of bits at most.
        let most: UInt64 = (512 << 20) * 8 * 512
        for clusterBits: UInt32 in [9, 21] {
            #expect(
                BitmapEntry.isAllowed(
                    diskByteCount: most, granularityBits: 9, clusterBits: clusterBits))
            #expect(
                !BitmapEntry.isAllowed(
                    diskByteCount: most + 1, granularityBits: 9, clusterBits: clusterBits))
        }
    }

    @Test("What is unknown of a bitmap makes its marks unknown, and flags say the rest")
    func bitmapMeaning() throws {
        #expect(try entry().isUnderstood)
        #expect(try entry { $0.flags = 7 }.isUnderstood)
        #expect(try entry { ($0.flags, $0.extraData) = (0, []) }.isUnderstood)
        #expect(try !entry { $0.flags = 13 }.isUnderstood)
        #expect(try !entry { $0.flags = 1 }.isUnderstood)
        #expect(try !entry { $0.type = 2 }.isUnderstood)
        for (flags, isInUse, isAuto) in [(0, false, false), (1, true, false), (2, false, true)]
            as [(UInt32, Bool, Bool)]
        {
            let found = try entry { $0.flags = flags }
            #expect(found.isInUse == isInUse && found.isAuto == isAuto)
        }
    }

    @Test("An entry of a bitmap's table is a whole cluster, nothing, or all ones")
    func bitmapTableEntries() {
        for (bits, isValid, offset) in [
            (0, true, 0), (1, true, 0), (2, false, 0), (65536, true, 65536),
            (65537, false, 65536), (65536 + 512, false, 65536 + 512), (1 << 63, false, 0),
            (1 << 56, false, 0), (1 << 55, true, 1 << 55), (256, false, 0),
        ] as [(UInt64, Bool, UInt64)] {
            let entry = BitmapTableEntry(bits: bits)
            #expect(entry.isValid(clusterByteCount: 65536) == isValid, "\(bits)")
            #expect(entry.offset == offset, "\(bits)")
        }
    }

    // MARK: Snapshots

    static func snapshot(_ change: (inout Snapshot) -> Void = { _ in }) -> Snapshot {
        var extra = [UInt8](repeating: 0, count: 28)
        extra.put(UInt64(0x0102_0304), at: 0)
        extra.put(UInt64(0x0506_0708), at: 8)
        extra.put(UInt64(0x090a_0b0c), at: 16)
        var snapshot = Snapshot(
            l1Offset: 0x0011_2233_4455_0000, l1EntryCount: 0x1234, idBytes: Array("42".utf8),
            nameBytes: Array("before".utf8), seconds: 0x1111_2222, nanoseconds: 0x3333_4444,
            guestClockNanoseconds: 0x5555_6666_7777_8888, vmStateByteCount: 0x0102_0304,
            diskByteCount: 0x0506_0708, instructionCount: 0x090a_0b0c, extraData: extra)
        change(&snapshot)
        return snapshot
    }

    func parse(
        _ bytes: [UInt8], count: Int
    ) throws(FormatError) -> (snapshots: [Snapshot], byteCount: Int) {
        try bytes.withUnsafeBytes { raw in
            Result { () throws(FormatError) in try Snapshot.parseTable(raw, count: count) }
        }.get()
    }

    @Test("A snapshot's entry, field by field")
    func snapshotFields() throws {
        let bytes: [UInt8] =
            [0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0, 0, 0, 0, 0x12, 0x34, 0, 2, 0, 6]
            + [0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0x44, 0x44]
            + [0x55, 0x55, 0x66, 0x66, 0x77, 0x77, 0x88, 0x88]
            + [1, 2, 3, 4, 0, 0, 0, 28] + [0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 7, 8]
            + [0, 0, 0, 0, 9, 10, 11, 12, 0, 0, 0, 0] + Array("42before".utf8) + [0, 0, 0, 0]
        #expect(bytes.count == 80)
        #expect(Snapshot.encodeTable([Self.snapshot()]) == bytes)
        let (found, byteCount) = try parse(bytes, count: 1)
        #expect(found == [Self.snapshot()] && byteCount == 80)
        #expect([Self.snapshot(), Self.snapshot()].tableByteCount == 160)
        // The last entry's padding may be missing.
        #expect(try parse(Array(bytes.dropLast(4)), count: 1).snapshots == [Self.snapshot()])
        #expect(try parse(bytes + bytes, count: 2).snapshots == [Self.snapshot(), Self.snapshot()])
        #expect(try parse(bytes, count: 0).byteCount == 0)
    }

    @Test("Extra data says what old entries leave open")
    func snapshotExtraData() throws {
        func parsed(_ extra: [UInt8]) throws -> Snapshot {
            let bytes = Snapshot.encodeTable([Self.snapshot { $0.extraData = extra }])
            return try #require(try parse(bytes, count: 1).snapshots.first)
        }
        let extra = Self.snapshot().extraData
        let none = try parsed([])
        #expect(none.vmStateByteCount == 0x0102_0304 && none.diskByteCount == nil)
        #expect(none.instructionCount == nil && none.extraData == [])
        #expect(try parsed(Array(extra.prefix(15))).diskByteCount == nil)
        #expect(try parsed(Array(extra.prefix(16))).diskByteCount == 0x0506_0708)
        #expect(try parsed(Array(extra.prefix(23))).instructionCount == nil)
        #expect(try parsed(Array(extra.prefix(24))).instructionCount == 0x090a_0b0c)
        var uncounted = extra
        uncounted.put(UInt64.max, at: 16)
        #expect(try parsed(uncounted).instructionCount == nil)
        var large = extra
        large.put(UInt64(1) << 40, at: 0)
        #expect(try parsed(large).vmStateByteCount == 1 << 40)
    }

    @Test("A snapshot table ends with its last entry's name")
    func snapshotLimits() {
        func expect(_ error: FormatError, _ bytes: [UInt8], count: Int = 1) {
            #expect(throws: error) { try parse(bytes, count: count) }
        }
        let bytes = Snapshot.encodeTable([Self.snapshot()])
        for found in [0, 39] {
            expect(
                .truncated("snapshot table", needed: 40, found: UInt64(found)),
                Array(bytes.prefix(found)))
        }
        for found in [40, 75] {
            expect(
                .truncated("snapshot table", needed: 76, found: UInt64(found)),
                Array(bytes.prefix(found)))
        }
        expect(.truncated("snapshot table", needed: 120, found: 80), bytes, count: 2)
        func extra(_ count: Int) -> [UInt8] {
            Snapshot.encodeTable([
                Self.snapshot { $0.extraData = [UInt8](repeating: 1, count: count) }
            ])
        }
        #expect((try? parse(extra(1024), count: 1).snapshots.first?.extraData.count) == 1024)
        expect(.tooLarge("snapshot's extra data", value: 1025, limit: 1024), extra(1025))
    }

    @Test("The entries before the first bad one can be had")
    func snapshotPrefix() {
        func prefix(_ bytes: [UInt8], _ count: Int) -> [Snapshot] {
            bytes.withUnsafeBytes { Snapshot.parsePrefix($0, count: count) }
        }
        let three = [1, 2, 3].map { seconds in Self.snapshot { $0.seconds = seconds } }
        let bytes = Snapshot.encodeTable(three)
        #expect(prefix(bytes, 3) == three)
        #expect(prefix(bytes, 2) == Array(three.prefix(2)))
        #expect(prefix(bytes, 9) == three)
        #expect(prefix(bytes, 0) == [])
        #expect(prefix(Array(bytes.prefix(155)), 3) == Array(three.prefix(1)))
    }

    @Test("A snapshot's L1 table stays within its limits")
    func snapshotTables() {
        func check(_ offset: UInt64, _ count: UInt32) throws(FormatError) {
            try Self.snapshot {
                $0.l1Offset = offset
                $0.l1EntryCount = count
            }.check(clusterByteCount: 65536)
        }
        #expect(throws: Never.self) { try check(65536, 4 << 20) }
        #expect(throws: Never.self) { try check(Self.hostEnd - 65536, 0) }
        #expect(
            throws: FormatError.tooLarge(
                "L1 table of snapshot 42", value: 32 << 20 + 8, limit: 32 << 20)
        ) { try check(65536, 4 << 20 + 1) }
        for offset in [65544, Self.hostEnd] {
            #expect(
                throws: FormatError.misaligned(
                    "L1 table of snapshot 42", offset: offset, alignment: 65536)
            ) { try check(offset, 1) }
        }
    }

    @Test("New snapshots count on from the highest number, and are found by either word")
    func snapshotNames() {
        func named(_ id: String, _ name: String) -> Snapshot {
            Self.snapshot { ($0.idBytes, $0.nameBytes) = (Array(id.utf8), Array(name.utf8)) }
        }
        #expect([Snapshot]().nextID == "1")
        #expect([named("x", "")].nextID == "1")
        #expect([named("7", ""), named("12ab", ""), named("3", "")].nextID == "13")
        #expect([named("18446744073709551615", "")].nextID == "1")
        #expect([named("18446744073709551614", "")].nextID == "18446744073709551615")
        let both = [named("1", "2"), named("2", "1")]
        #expect(both.find("1") == both[0] && both.find("2") == both[1] && both.find("3") == nil)
        #expect(both.findForDeletion("1") == both[1] && both.findForDeletion("2") == both[0])
        #expect([named("5", "a")].find("a") != nil && [named("5", "a")].findForDeletion("5") != nil)
    }

    @Test("A new entry has three numbers of extra data, and no instruction count")
    func newSnapshot() throws {
        let new = Snapshot(
            id: "9", name: "now", seconds: 1, nanoseconds: 2, diskByteCount: 0x1_0000)
        #expect(
            new.extraData == [UInt8](repeating: 0, count: 13) + [1, 0, 0]
                + [UInt8](repeating: 0xff, count: 8))
        let found = try #require(
            try parse(Snapshot.encodeTable([new]), count: 1).snapshots.first)
        #expect(found == new && found.byteCount == 72)
        #expect(found.instructionCount == nil && found.vmStateByteCount == 0)
        #expect(found.l1Offset == 0 && found.l1EntryCount == 0 && found.guestClockNanoseconds == 0)
    }
}
