import QCOW2
import TestSupport
import Testing

/// The last number that is allowed, and the first that is not.
@Suite("Limits of the format, from both sides")
struct FormatLimitTests {
    static let hostEnd: UInt64 = 1 << 56

    /// What the header of an image is parsed as, with some numbers changed.
    func parse(
        clusterBits: Int = 16, version: UInt32 = 3, extended: Bool = false,
        extensions: [(type: UInt32, data: [UInt8])] = [],
        _ change: (inout [UInt8]) -> Void = { _ in }
    ) throws(FormatError) -> Header {
        var builder = ImageBuilder(
            byteCount: 1.MiB, version: version, clusterBits: clusterBits, isExtended: extended)
        builder.extensions = extensions
        var bytes = builder.build()
        change(&bytes)
        return try bytes.withUnsafeBytes { raw in
            Result { () throws(FormatError) in try Header.parse(raw) }
        }.get()
    }

    func expect(
        _ error: FormatError?, clusterBits: Int = 16, version: UInt32 = 3, extended: Bool = false,
        extensions: [(type: UInt32, data: [UInt8])] = [],
        sourceLocation: SourceLocation = #_sourceLocation,
        _ change: (inout [UInt8]) -> Void = { _ in }
    ) {
        do throws(FormatError) {
            _ = try parse(
                clusterBits: clusterBits, version: version, extended: extended,
                extensions: extensions, change)
            #expect(error == nil, sourceLocation: sourceLocation)
        } catch let found {
            #expect(found == error, sourceLocation: sourceLocation)
        }
    }

    @Test("A header ends with its last field")
    func length() throws {
        expect(nil, version: 2) { $0.removeLast($0.count - 72) }
        expect(.truncated("header", needed: 72, found: 71), version: 2) {
            $0.removeLast($0.count - 71)
        }
        expect(nil) {
            $0.put(UInt32(104), at: 100)
            $0.removeLast($0.count - 104)
        }
        expect(.truncated("header", needed: 104, found: 103)) { $0.removeLast($0.count - 103) }
        expect(.truncated("header", needed: 112, found: 104)) { $0.removeLast($0.count - 104) }
        expect(nil) { $0.removeLast($0.count - 112) }
        expect(nil, clusterBits: 9) { $0.put(UInt32(512), at: 100) }
        expect(
            .outOfRange("header_length", value: 520, allowed: "104 to 512"), clusterBits: 9
        ) { $0.put(UInt32(520), at: 100) }
        expect(.outOfRange("header_length", value: 96, allowed: "104 to 65536")) {
            $0.put(UInt32(96), at: 100)
        }
        let long = try parse {
            $0.put(UInt32(128), at: 100)
            $0.put(UInt64(1), at: 112)
            $0.put(UInt64(2), at: 120)
        }
        #expect(long.unknownFields == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2])
        #expect(try parse().unknownFields == [])
    }

    @Test(
        "Clusters have 512 bytes to 2 MiB, with subclusters 16 KiB at least; counts up to 64 bits")
    func clusterSizes() {
        for bits in [9, 21] { expect(nil, clusterBits: bits) }
        for bits in [14, 21] { expect(nil, clusterBits: bits, extended: true) }
        expect(
            .outOfRange("cluster_bits with extended L2 entries", value: 13, allowed: "14 to 21"),
            clusterBits: 13, extended: true)
        for bits: UInt32 in [8, 22] {
            expect(.outOfRange("cluster_bits", value: UInt64(bits), allowed: "9 to 21")) {
                $0.put(bits, at: 20)
            }
        }
        for order: UInt32 in [0, 6] { expect(nil) { $0.put(order, at: 96) } }
        expect(.outOfRange("refcount_order", value: 7, allowed: "0 to 6")) {
            $0.put(UInt32(7), at: 96)
        }
    }

    @Test("A backing file's name has up to 1023 bytes between the header and the cluster's end")
    func backingName() throws {
        func name(at offset: UInt64, _ count: UInt32) -> (inout [UInt8]) -> Void {
            {
                $0.put(offset, at: 8)
                $0.put(count, at: 16)
            }
        }
        let range = "112 to 65536"
        expect(nil, name(at: 112, 5))
        expect(.outOfRange("backing_file_offset", value: 111, allowed: range), name(at: 111, 5))
        expect(nil, name(at: 65536, 0))
        expect(.outOfRange("backing_file_offset", value: 65537, allowed: range), name(at: 65537, 0))
        expect(nil, name(at: 4096, 1023))
        expect(.tooLarge("backing file's name", value: 1024, limit: 1023), name(at: 4096, 1024))
        expect(nil, name(at: 65536 - 10, 10))
        expect(.tooLarge("backing file's name", value: 11, limit: 10), name(at: 65536 - 10, 11))
        expect(nil) {
            name(at: 200, 10)(&$0)
            $0.removeLast($0.count - 210)
        }
        expect(.truncated("backing file's name", needed: 210, found: 209)) {
            name(at: 200, 10)(&$0)
            $0.removeLast($0.count - 209)
        }
        #expect(try parse(name(at: 200, 0)).backingFile == nil)
        let named = try parse {
            name(at: 200, 3)(&$0)
            $0.put(Array("abcd".utf8), at: 200)
        }
        #expect(named.backingFile == "abc")
    }

    @Test("Tables lie at whole clusters and end at 2^56 at the latest")
    func tables() {
        let l1 = "L1 table"
        expect(nil) { $0.put(UInt32(4 << 20), at: 36) }
        expect(.tooLarge(l1, value: 32 << 20 + 8, limit: 32 << 20)) {
            $0.put(UInt32(4 << 20 + 1), at: 36)
        }
        expect(nil) {
            $0.put(Self.hostEnd - 65536, at: 40)
            $0.put(UInt32(8192), at: 36)
        }
        expect(.tooLarge("offset of the \(l1)", value: Self.hostEnd - 65536, limit: Self.hostEnd)) {
            $0.put(Self.hostEnd - 65536, at: 40)
            $0.put(UInt32(8193), at: 36)
        }
        expect(.misaligned(l1, offset: 65544, alignment: 65536)) { $0.put(UInt64(65544), at: 40) }
        let counts = "refcount table"
        expect(nil) { $0.put(UInt32(128), at: 56) }
        expect(.tooLarge(counts, value: 129 << 16, limit: 8 << 20)) { $0.put(UInt32(129), at: 56) }
        expect(nil, clusterBits: 21) { $0.put(UInt32(4), at: 56) }
        expect(.tooLarge(counts, value: 10 << 20, limit: 8 << 20), clusterBits: 21) {
            $0.put(UInt32(5), at: 56)
        }
        expect(nil) { $0.put(Self.hostEnd - 65536, at: 48) }
        expect(.tooLarge("offset of the \(counts)", value: Self.hostEnd, limit: Self.hostEnd)) {
            $0.put(Self.hostEnd, at: 48)
        }
        expect(.outOfRange("refcount_table_clusters", value: 0, allowed: "1 or more")) {
            $0.put(UInt32(0), at: 56)
        }
        let snapshots = "snapshot table"
        expect(nil) { $0.put(UInt32(65536), at: 60) }
        expect(.tooLarge("number of snapshots", value: 65537, limit: 65536)) {
            $0.put(UInt32(65537), at: 60)
        }
        expect(nil) { $0.put(Self.hostEnd, at: 64) }
        expect(
            .tooLarge(
                "offset of the \(snapshots)", value: Self.hostEnd + 65536, limit: Self.hostEnd)
        ) { $0.put(Self.hostEnd + 65536, at: 64) }
        expect(.misaligned(snapshots, offset: 512, alignment: 65536)) {
            $0.put(UInt64(512), at: 64)
        }
    }

    @Test("The L1 table covers the disk, to the last byte")
    func coverage() throws {
        func inconsistent(_ size: UInt64) -> FormatError {
            .inconsistent("the L1 table has 1 entries, a disk of \(size) bytes needs 2")
        }
        for (bits, extended, covered) in [
            (16, false, 512 << 20), (16, true, 256 << 20), (9, false, 32768), (14, true, 16 << 20),
        ] as [(Int, Bool, UInt64)] {
            for size in [covered, covered + 1] {
                expect(
                    size == covered ? nil : inconsistent(size), clusterBits: bits,
                    extended: extended
                ) {
                    $0.put(size, at: 24)
                    $0.put(UInt32(1), at: 36)
                }
            }
        }
        let header = try parse(clusterBits: 9)
        #expect(
            [0, 1, 32768, 32769, 65536, 65537].map(header.l1EntryCountNeeded) == [0, 1, 1, 2, 2, 3])
        let most = UInt64(Int64.max) - 1 << 21
        expect(.tooLarge("virtual size", value: most + 1, limit: most)) {
            $0.put(most + 1, at: 24)
        }
        // So far the disk may go, but no L1 table.
        expect(
            .inconsistent(
                "the L1 table has 1 entries, a disk of \(most) bytes needs 17179869184")
        ) { $0.put(most, at: 24) }
    }

    @Test("The format of a backing file has 15 characters at most")
    func backingFormat() throws {
        let name = [UInt8](repeating: 0x71, count: 16)
        let header = try parse(extensions: [(0xE279_2ACA, name.dropLast())])
        #expect(header.backingFormat == String(repeating: "q", count: 15))
        expect(
            .tooLarge("backing format's name", value: 16, limit: 15),
            extensions: [(0xE279_2ACA, name)])
    }

    @Test("Extensions fill the room before the backing file's name, and end without a marker")
    func extensions() throws {
        let start = 112
        func record(_ length: UInt32, at offset: Int, in bytes: inout [UInt8]) {
            bytes.put(UInt32(0x1234_5678), at: offset)
            bytes.put(length, at: offset + 4)
        }
        // Exactly full, and one byte more.
        let room = UInt32(512 - start - 8)
        #expect(
            try parse(clusterBits: 9) { record(room, at: start, in: &$0) }.extensions.map(
                \.data.count)
                == [Int(room)])
        expect(
            .truncated(
                "header extension 0x12345678", needed: UInt64(room) + 1, found: UInt64(room)),
            clusterBits: 9
        ) { record(room + 1, at: start, in: &$0) }
        // Data is padded to a multiple of 8.
        for length: UInt32 in 1...9 {
            let header = try parse {
                record(length, at: start, in: &$0)
                record(1, at: start + 8 + (length > 8 ? 16 : 8), in: &$0)
            }
            #expect(header.extensions.map(\.data.count) == [Int(length), 1])
        }
        expect(.truncated("header extension", needed: 8, found: 4)) {
            record(0, at: start, in: &$0)
            $0.removeLast($0.count - start - 12)
        }
        // The name's bytes are no extension.
        let header = try parse {
            record(0, at: start, in: &$0)
            record(0, at: start + 8, in: &$0)
            $0.put(UInt64(start + 8), at: 8)
            $0.put(UInt32(4), at: 16)
        }
        #expect(header.extensions == [HeaderExtension(type: 0x1234_5678, data: [])])
        expect(
            .inconsistent("header extension 0x6803f857 appears twice"),
            extensions: [(0x6803_f857, []), (0x6803_f857, [])])
        expect(nil, extensions: [(0x1234_5678, []), (0x1234_5678, [])])
    }

    @Test("The bitmaps extension")
    func bitmaps() throws {
        func data(_ count: UInt32, _ reserved: UInt32, _ bytes: UInt64, _ offset: UInt64) -> [UInt8]
        {
            var data = [UInt8](repeating: 0, count: 24)
            data.put(count, at: 0)
            data.put(reserved, at: 4)
            data.put(bytes, at: 8)
            data.put(offset, at: 16)
            return data
        }
        func expect(_ error: FormatError?, _ data: [UInt8]) {
            self.expect(error, extensions: [(0x2385_2875, data)])
        }
        let most: UInt64 = 64 << 20 - 1 << 10
        let last = Self.hostEnd - 65536
        expect(nil, data(1, 0, 32, 65536))
        expect(nil, data(65535, 0, most, last))
        for count: UInt32 in [0, 65536] {
            expect(
                .outOfRange("number of bitmaps", value: UInt64(count), allowed: "1 to 65535"),
                data(count, 0, 32, 65536))
        }
        expect(
            .outOfRange("bitmaps extension's reserved field", value: 1, allowed: "0"),
            data(1, 1, 32, 65536))
        expect(
            .tooLarge("bitmap directory", value: most + 1, limit: most),
            data(1, 0, most + 1, 65536))
        for offset in [65544, Self.hostEnd] {
            expect(
                .misaligned("bitmap directory", offset: offset, alignment: 65536),
                data(1, 0, 32, offset))
        }
        for length in [23, 25] {
            expect(
                .outOfRange("bitmaps extension's length", value: UInt64(length), allowed: "24"),
                Array((data(1, 0, 32, 65536) + [0]).prefix(length)))
        }
        let found = try parse(extensions: [(0x2385_2875, data(3, 0, 100, 131072))]).bitmaps
        #expect(
            found == BitmapsExtension(count: 3, directoryByteCount: 100, directoryOffset: 131072))
        #expect(found?.encoded == data(3, 0, 100, 131072))
    }

    @Test("The pointer to a LUKS header")
    func encryption() throws {
        func data(_ offset: UInt64, _ bytes: UInt64) -> [UInt8] {
            var data = [UInt8](repeating: 0, count: 16)
            data.put(offset, at: 0)
            data.put(bytes, at: 8)
            return data
        }
        func expect(_ error: FormatError?, _ data: [UInt8]) {
            self.expect(error, extensions: [(0x0537_be77, data)]) { $0.put(UInt32(2), at: 32) }
        }
        let most: UInt64 = 32 << 20
        expect(nil, data(65536, most))
        expect(nil, data(Self.hostEnd - 65536, 65536))
        expect(
            .tooLarge("LUKS header's area", value: most + 1, limit: most), data(65536, most + 1))
        for (offset, bytes) in [(0, 592), (Self.hostEnd - 65536, 65537)] as [(UInt64, UInt64)] {
            expect(
                .outOfRange(
                    "offset of the LUKS header", value: offset,
                    allowed: "65536 to \(Self.hostEnd)"), data(offset, bytes))
        }
        expect(.misaligned("LUKS header", offset: 65544, alignment: 65536), data(65544, 592))
        expect(
            .outOfRange("LUKS header extension's length", value: 17, allowed: "16"),
            data(65536, 592) + [0])
        self.expect(
            .inconsistent("the LUKS header extension and crypt_method 1 disagree"),
            extensions: [(0x0537_be77, data(65536, 592))]
        ) { $0.put(UInt32(1), at: 32) }
        self.expect(.outOfRange("crypt_method", value: 3, allowed: "0, 1, 2")) {
            $0.put(UInt32(3), at: 32)
        }
        self.expect(nil) { $0.put(UInt32(1), at: 32) }
    }
}
