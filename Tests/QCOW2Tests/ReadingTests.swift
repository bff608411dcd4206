import QCOW2
import TestSupport
import Testing

/// What the guest reads, on images built in view.
@Suite("Reading")
struct ReadingTests {
    private func expect(
        _ image: ImageBuilder, backing: [Image.Backing] = [], reads expected: [(Range<Int>, UInt8)],
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let image = try Image.open(bytes: image.build(), backing: backing, options: .readOnly)
        for (range, byte) in expected {
            #expect(
                try image.bytes(range).allSatisfy { $0 == byte },
                "\(range) should be \(byte)", sourceLocation: sourceLocation)
        }
        try image.close()
    }

    private func expectFailure(
        _ code: Int32, _ image: ImageBuilder, reading range: Range<Int>,
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let image = try Image.open(bytes: image.build(), options: .readOnly)
        do {
            _ = try image.bytes(range)
            Issue.record("it was read", sourceLocation: sourceLocation)
        } catch { #expect(error.code == code, "\(error)", sourceLocation: sourceLocation) }
        try image.close()
    }

    static let inputOutputError: Int32 = 5

    @Test(
        "Every kind of cluster reads as the format says, at every size and version",
        arguments: [9, 12, 16, 21], [UInt32(2), 3])
    func everyKind(clusterBits: Int, version: UInt32) throws {
        let size = 1 << clusterBits
        var image = ImageBuilder(byteCount: 9 * size, version: version, clusterBits: clusterBits)
        image.fill(0x11, guestCluster: 1)
        image.compress([UInt8](repeating: 0x22, count: size), guestCluster: 2)
        if version == 3 {
            image.zero(guestCluster: 3)
            image.zeroAllocated(guestCluster: 4)
        }
        image.fill(0x66, guestCluster: 6)
        try expect(
            image, backing: [rawDisk(0xBB, 9 * size)],
            reads: [
                (0..<size, 0xBB), (size..<2 * size, 0x11), (2 * size..<3 * size, 0x22),
                (3 * size..<5 * size, version == 3 ? 0 : 0xBB), (5 * size..<6 * size, 0xBB),
                (6 * size..<7 * size, 0x66),
            ])
    }

    @Test("Trap 26: reading past the end of a shorter backing file gives zeros, to the byte")
    func shorterBacking() throws {
        let image = ImageBuilder(byteCount: 256.KiB)
        try expect(
            image, backing: [rawDisk(0xBB, 100_001)],
            reads: [(0..<100_001, 0xBB), (100_001..<256.KiB, 0)])
    }

    @Test("A longer backing file shows only what the overlay's size lets through")
    func longerBacking() throws {
        let image = ImageBuilder(byteCount: 64.KiB)
        try expect(image, backing: [rawDisk(0xBB, 1.MiB)], reads: [(0..<64.KiB, 0xBB)])
    }

    @Test("A chain is read through layers of different cluster sizes")
    func chain() throws {
        var middle = ImageBuilder(byteCount: 128.KiB, clusterBits: 9)
        middle.fill(0x33, guestCluster: 4)
        var top = ImageBuilder(byteCount: 128.KiB, clusterBits: 12)
        top.fill(0x44, guestCluster: 1)
        try expect(
            top,
            backing: [
                .qcow2(RecordingDevice(middle.build(), yielding: false)), rawDisk(0xBB, 128.KiB),
            ],
            reads: [
                (0..<2048, 0xBB), (2048..<2560, 0x33), (2560..<4096, 0xBB), (4096..<8192, 0x44),
                (8192..<128.KiB, 0xBB),
            ])
    }

    /// An entry taken from an image that QEMU wrote; where its stream starts, and its most bytes.
    struct Example: Sendable, CustomTestStringConvertible {
        let clusterBits: Int
        let entry: UInt64
        let offset: Int
        let byteCount: Int
        var testDescription: String { hex(entry) }
    }

    static let examples = [
        Example(clusterBits: 9, entry: 0x6000_0000_0000_0B13, offset: 0xB13, byteCount: 749),
        Example(clusterBits: 9, entry: 0x4000_0000_0000_0A00, offset: 0xA00, byteCount: 512),
        Example(clusterBits: 12, entry: 0x5000_0000_0000_5842, offset: 0x5842, byteCount: 2494),
        Example(clusterBits: 16, entry: 0x5040_0000_0006_81B5, offset: 0x681B5, byteCount: 33355),
        Example(
            clusterBits: 21, entry: 0x500C_0000_00C0_15B2, offset: 0xC015B2, byteCount: 1_051_726),
    ]

    @Test(
        "Trap 27: a compressed descriptor's widths follow the cluster size", arguments: examples)
    func compressedExamples(_ example: Example) throws {
        let size = 1 << example.clusterBits
        var image = ImageBuilder(byteCount: 4 * size, clusterBits: example.clusterBits)
        while image.allocate(byteCount: size) < example.offset + example.byteCount {}
        image.put(
            Streams.deflate([UInt8](repeating: 0x5C, count: size)), at: example.offset)
        image.setEntry(example.entry, guestCluster: 1)
        let bytes = image.build()
        try bytes.withUnsafeBytes { bytes in
            let entry = try ReferenceReader(bytes).entry(example.entry)
            #expect(entry == .compressed(example.offset, byteCount: example.byteCount))
        }
        try expect(image, reads: [(0..<size, 0), (size..<2 * size, 0x5C)])
    }

    @Test("A stream may end in the next host cluster", arguments: [UInt8(0), 1])
    func streamCrossesClusters(type: UInt8) throws {
        var random = RepeatableRandom(seed: 3)
        let cluster = (0..<4096).map { _ in UInt8(truncatingIfNeeded: random.next()) & 0x3F }
        var image = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
        image.compressionType = type
        let stream = type == 0 ? Streams.deflate(cluster) : Streams.zstd(cluster)
        _ = image.entryOffset(2)
        let host = image.allocate(byteCount: 2 * 4096)
        image.place(stream: stream, guestCluster: 2, at: host + 4096 - 100)
        let opened = try Image.open(bytes: image.build(), options: .readOnly)
        #expect(try opened.bytes(8192..<12288) == cluster)
        #expect(try opened.bytes(9000..<9010) == Array(cluster[808..<818]))
        try opened.close()
    }

    @Test(
        "Trap 31: garbage after a stream and a count of sectors past the file's end do no harm",
        arguments: [UInt8(0), 1], [UInt8(0), 0xFF])
    func garbageAfterStream(type: UInt8, garbage: UInt8) throws {
        var image = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
        image.compressionType = type
        _ = image.entryOffset(0)
        let host = image.allocate(byteCount: 4096)
        let content = [UInt8](repeating: 0x77, count: 4096)
        let stream = type == 0 ? Streams.deflate(content) : Streams.zstd(content)
        image.put(stream + [UInt8](repeating: garbage, count: 2000), at: host)
        image.setEntry(1 << 62 | 15 << 58 | UInt64(host), guestCluster: 0)
        try expect(image, reads: [(0..<4096, 0x77)])
    }

    @Test("A stream that ends early or makes no sense is an error for its own bytes only")
    func brokenStream() throws {
        var image = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
        image.place(
            stream: Streams.deflate([UInt8](repeating: 1, count: 2048)), guestCluster: 0)
        image.place(stream: [UInt8](repeating: 0xFF, count: 300), guestCluster: 1)
        image.fill(0x22, guestCluster: 2)
        try expectFailure(Self.inputOutputError, image, reading: 0..<4096)
        try expectFailure(Self.inputOutputError, image, reading: 4096..<5000)
        try expect(image, reads: [(8192..<12288, 0x22)])
    }

    @Test(
        "Entries that break the format are an error for their own bytes only",
        arguments: [
            0x8000_0000_0001_0200, 0x8000_0000_0000_0800, 0x8004_0000_0000_0000,
        ] as [UInt64])
    func brokenEntries(entry: UInt64) throws {
        var image = ImageBuilder(byteCount: 1.MiB)
        image.fill(0x11, guestCluster: 0)
        image.setEntry(entry, guestCluster: 1)
        try expect(image, reads: [(0..<64.KiB, 0x11)])
        let opened = try Image.open(bytes: image.build(), options: .readOnly)
        // Past the file's end QEMU reads zeros where the offset is not absurd; both are fine.
        if let bytes = try? opened.bytes(64.KiB..<128.KiB) {
            #expect(bytes.allSatisfy { $0 == 0 })
        }
        try opened.close()
    }

    @Test("The zero flag in version 2 is an error")
    func zeroFlagInVersion2() throws {
        var image = ImageBuilder(byteCount: 1.MiB, version: 2)
        image.setEntry(1, guestCluster: 1)
        try expectFailure(Self.inputOutputError, image, reading: 64.KiB..<128.KiB)
    }

    @Test("A file that ends inside a cluster reads zeros there")
    func endsInsideCluster() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        var bytes = builder.build()
        // The data cluster goes last, and the file ends after its first 100 bytes.
        builder.setEntry(UInt64(bytes.count) | 1 << 63, guestCluster: 0)
        bytes = builder.build()
        let host = bytes.count
        builder.setEntry(UInt64(host) | 1 << 63, guestCluster: 0)
        bytes = builder.build() + [UInt8](repeating: 0x33, count: 100)
        let image = try Image.open(bytes: bytes, options: .readOnly)
        #expect(try image.bytes(0..<100).allSatisfy { $0 == 0x33 })
        #expect(try image.bytes(100..<64.KiB).allSatisfy { $0 == 0 })
        try image.close()
    }

    @Test("Trap 36: offsets of terabytes are not cut to 32 bits")
    func hugeOffsets() throws {
        let size = 8 << 40
        var image = ImageBuilder(byteCount: size, clusterBits: 16)
        image.fill(0x99, guestCluster: 5 << 24)
        let opened = try Image.open(bytes: image.build(), options: .readOnly)
        #expect(opened.size == UInt64(size))
        #expect(try opened.bytes(5 << 40..<5 << 40 + 512).allSatisfy { $0 == 0x99 })
        #expect(try opened.bytes(1 << 40..<1 << 40 + 512).allSatisfy { $0 == 0 })
        #expect(try opened.seekData(from: 0) == 5 << 40)
        #expect(try opened.seekHole(from: 5 << 40) == 5 << 40 + 65536)
        try opened.close()
    }

    @Test("Trap 36: reading across the end of the disk is an invalid argument")
    func outside() throws {
        let image = try Image.open(bytes: ImageBuilder(byteCount: 1.MiB).build())
        #expect {
            try image.bytes(1.MiB - 512..<1.MiB + 512)
        } throws: { ($0 as? ImageError)?.code == 22 }
        try image.close()
    }

    @Test("Holes are what metadata proves zero, through the chain")
    func holes() throws {
        var base = ImageBuilder(byteCount: 1.MiB)
        base.fill(1, guestCluster: 2)
        base.fill(1, guestCluster: 9)
        var top = ImageBuilder(byteCount: 1.MiB)
        top.fill(2, guestCluster: 4)
        top.zero(guestCluster: 9)
        top.zeroAllocated(guestCluster: 5)
        let image = try Image.open(
            bytes: top.build(),
            backing: [.qcow2(RecordingDevice(base.build(), yielding: false))],
            options: .readOnly)
        let cluster: UInt64 = 65536
        #expect(try image.seekData(from: 0) == 2 * cluster)
        #expect(try image.seekHole(from: 2 * cluster) == 3 * cluster)
        #expect(try image.seekData(from: 3 * cluster) == 4 * cluster)
        #expect(try image.seekHole(from: 4 * cluster + 5) == 5 * cluster)
        #expect(try image.seekData(from: 5 * cluster) == nil)
        #expect(try image.seekHole(from: 0) == 0)
        try image.close()
    }
}
