import QCOW2
import TestSupport
import Testing

/// What the guest reads where L2 entries are extended, state by state.
@Suite("Reading subclusters")
struct SubclusterReadingTests {
    static let sizes = [14, 16, 21]

    /// What a row of the state table reads as.
    enum Source: Sendable { case host, zeros, below, stream, error }

    /// A row of the state table, for one subcluster of the entry.
    struct Row: Sendable, CustomTestStringConvertible {
        let testDescription: String
        var hasCluster = true
        var flags: UInt64 = 1 << 63
        let allocated: UInt32
        let zero: UInt32
        let source: Source
    }

    /// Bit 5 is the one looked at.
    static let rows = [
        Row(testDescription: "normal", allocated: 1 << 5, zero: 0, source: .host),
        Row(testDescription: "normal, all of them", allocated: .max, zero: 0, source: .host),
        Row(testDescription: "zero, with space", allocated: 0, zero: 1 << 5, source: .zeros),
        Row(
            testDescription: "zero beside data", allocated: 1 << 4 | 1 << 6, zero: 1 << 5,
            source: .zeros),
        Row(testDescription: "unallocated, with space", allocated: 0, zero: 0, source: .below),
        Row(
            testDescription: "unallocated beside data and zeros", allocated: 1 << 6, zero: 1 << 4,
            source: .below),
        Row(
            testDescription: "allocated and zero at once", allocated: 1 << 5, zero: 1 << 5,
            source: .error),
        Row(
            testDescription: "another one allocated and zero at once", allocated: 1 << 5 | 1 << 31,
            zero: 1 << 31, source: .error),
        Row(
            testDescription: "zero, no cluster", hasCluster: false, flags: 0, allocated: 0,
            zero: 1 << 5, source: .zeros),
        Row(
            testDescription: "unallocated, no cluster", hasCluster: false, flags: 0, allocated: 0,
            zero: 1 << 4, source: .below),
        Row(
            testDescription: "allocated, no cluster", hasCluster: false, flags: 0,
            allocated: 1 << 5, zero: 0, source: .error),
        Row(
            testDescription: "another one allocated, no cluster", hasCluster: false, flags: 0,
            allocated: 1, zero: 1 << 5, source: .error),
        Row(
            testDescription: "normal, not COPIED", flags: 0, allocated: 1 << 5, zero: 0,
            source: .host),
    ]

    /// An image whose guest cluster 1 is as `row` says; clusters 0 and 2 are data.
    private func image(_ row: Row, clusterBits: Int) -> ImageBuilder {
        let size = 1 << clusterBits
        var image = ImageBuilder(
            byteCount: 4 * size, clusterBits: clusterBits, isExtended: true)
        image.fill(0x11, guestCluster: 0)
        let host = image.fill(0x22, guestCluster: 1)
        image.fill(0x33, guestCluster: 2)
        image.setEntry(row.hasCluster ? UInt64(host) | row.flags : row.flags, guestCluster: 1)
        image.setBitmap(UInt64(row.zero) << 32 | UInt64(row.allocated), guestCluster: 1)
        return image
    }

    @Test("Every row of the state table reads as it says", arguments: rows, [false, true])
    func stateTable(_ row: Row, hasBacking: Bool) throws {
        for clusterBits in Self.sizes {
            let size = 1 << clusterBits
            let image = try Image.open(
                bytes: image(row, clusterBits: clusterBits).build(),
                backing: hasBacking ? [rawDisk(0xBB, 4 * size)] : [], options: .readOnly)
            defer { try? image.close() }
            #expect(try image.bytes(size - 512..<size).allSatisfy { $0 == 0x11 })
            #expect(try image.bytes(2 * size..<2 * size + 512).allSatisfy { $0 == 0x33 })
            let range = size + 5 * size / 32..<size + 6 * size / 32
            let expected: UInt8
            switch row.source {
            case .host: expected = 0x22
            case .zeros: expected = 0
            case .below: expected = hasBacking ? 0xBB : 0
            case .stream, .error:
                for part in [range, size..<size + 512, 2 * size - 512..<2 * size] {
                    #expect { try image.bytes(part) } throws: { ($0 as? ImageError)?.code == 5 }
                }
                continue
            }
            #expect(try image.bytes(range).allSatisfy { $0 == expected })
        }
    }

    @Test("A compressed cluster is read whole")
    func compressed() throws {
        for clusterBits in Self.sizes {
            let size = 1 << clusterBits
            var image = ImageBuilder(
                byteCount: 2 * size, clusterBits: clusterBits, isExtended: true)
            image.compress([UInt8](repeating: 0x5C, count: size), guestCluster: 1)
            let opened = try Image.open(bytes: image.build(), options: .readOnly)
            #expect(try opened.bytes(size - 512..<size).allSatisfy { $0 == 0 })
            for start in stride(from: size, to: 2 * size, by: size / 32) {
                #expect(try opened.bytes(start..<start + 512).allSatisfy { $0 == 0x5C })
            }
            try opened.close()
        }
    }

    @Test("A reader overlooks the bitmap of a compressed cluster, as QEMU does")
    func compressedWithBitmap() throws {
        var image = ImageBuilder(byteCount: 1.MiB, isExtended: true)
        image.compress([UInt8](repeating: 0x5C, count: 65536), guestCluster: 0)
        image.setBitmap(1 << 40 | 1, guestCluster: 0)
        let opened = try Image.open(bytes: image.build(), options: .readOnly)
        #expect(try opened.bytes(0..<65536).allSatisfy { $0 == 0x5C })
        try opened.close()
    }

    @Test("Trap 22: bit 0 of an extended entry is no zero flag")
    func zeroFlagMeansNothing() throws {
        var image = ImageBuilder(byteCount: 1.MiB, isExtended: true)
        let host = image.fill(0x22, guestCluster: 0)
        image.setEntry(UInt64(host) | 1 << 63 | 1, guestCluster: 0)
        image.setEntry(1, guestCluster: 1)
        let device = RecordingDevice(image.build(), yielding: false)
        let opened = try Image.open(device, backing: [rawDisk(0xBB, 1.MiB)])
        #expect(try opened.bytes(0..<65536).allSatisfy { $0 == 0x22 })
        #expect(try opened.bytes(65536..<131072).allSatisfy { $0 == 0xBB })
        // Nor does it become one when the entry is written to.
        try opened.write([UInt8](repeating: 7, count: 2048), at: 65536)
        try opened.write([UInt8](repeating: 8, count: 2048), at: 2048)
        try opened.close()
        let again = try Image.open(
            bytes: device.bytes, backing: [rawDisk(0xBB, 1.MiB)], options: .readOnly)
        #expect(try again.bytes(65536..<67584).allSatisfy { $0 == 7 })
        #expect(try again.bytes(67584..<131072).allSatisfy { $0 == 0xBB })
        #expect(try again.bytes(2048..<4096).allSatisfy { $0 == 8 })
        try again.close()
    }

    @Test("Trap 33: subcluster 0 is the lowest bit, and every clash is noticed")
    func everyBit() throws {
        for bit in 0..<32 {
            var image = ImageBuilder(byteCount: 1.MiB, isExtended: true)
            image.fill(0x22, guestCluster: 0)
            image.setBitmap(1 << UInt64(bit), guestCluster: 0)
            image.fill(0x33, guestCluster: 1)
            image.setBitmap(1 << UInt64(bit + 32), guestCluster: 1)
            image.fill(0x44, guestCluster: 2)
            image.setBitmap(1 << UInt64(bit + 32) | 1 << UInt64(bit), guestCluster: 2)
            image.setBitmap(1 << UInt64(bit), guestCluster: 3)
            let opened = try Image.open(
                bytes: image.build(), backing: [rawDisk(0xBB, 1.MiB)], options: .readOnly)
            let first = try opened.bytes(0..<65536)
            let second = try opened.bytes(65536..<131072)
            for index in 0..<32 {
                let part = index * 2048..<(index + 1) * 2048
                #expect(first[part].allSatisfy { $0 == (index == bit ? 0x22 : 0xBB) })
                #expect(second[part].allSatisfy { $0 == (index == bit ? 0 : 0xBB) })
            }
            for cluster in 2..<4 {
                #expect {
                    try opened.bytes(cluster * 65536..<cluster * 65536 + 1)
                } throws: { ($0 as? ImageError)?.code == 5 }
            }
            try opened.close()
        }
    }

    @Test("Trap 34: a reserved cluster of which nothing is allocated shows the backing file")
    func reservedShowsBacking() throws {
        var image = ImageBuilder(byteCount: 1.MiB, isExtended: true)
        for cluster in 0..<4 {
            image.fill(0xEE, guestCluster: cluster)
            image.setBitmap(0, guestCluster: cluster)
        }
        let bytes = image.build()
        let backed = try Image.open(
            bytes: bytes, backing: [rawDisk(0xBB, 100_000)], options: .readOnly)
        #expect(try backed.bytes(0..<100_000).allSatisfy { $0 == 0xBB })
        #expect(try backed.bytes(100_000..<1.MiB).allSatisfy { $0 == 0 })
        #expect(try backed.seekHole(from: 0) == 100_000)
        try backed.close()
        let alone = try Image.open(bytes: bytes, options: .readOnly)
        #expect(try alone.bytes(0..<1.MiB).allSatisfy { $0 == 0 })
        #expect(try alone.seekData(from: 0) == nil)
        try alone.close()
    }

    @Test("Any mixture of subclusters reads as the tests' own reader reads it")
    func mixtures() throws {
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        for _ in 0..<8 {
            let clusterBits = 14 + random.number(below: 2)
            let size = 1 << clusterBits
            var image = ImageBuilder(
                byteCount: 24 * size, clusterBits: clusterBits, isExtended: true)
            for cluster in 0..<24 {
                let allocated = UInt32(truncatingIfNeeded: random.next() & random.next())
                let zero = UInt32(truncatingIfNeeded: random.next() & random.next()) & ~allocated
                switch random.number(below: 4) {
                case 0: image.setBitmap(UInt64(zero) << 32, guestCluster: cluster)
                case 1: image.fill(UInt8(cluster + 1), guestCluster: cluster)
                default:
                    image.fill(UInt8(cluster + 1), guestCluster: cluster)
                    image.setBitmap(UInt64(zero) << 32 | UInt64(allocated), guestCluster: cluster)
                }
            }
            let bytes = image.build()
            let expected = try bytes.withUnsafeBytes {
                try ReferenceReader($0).read(0..<24 * size) { _, part in
                    part.initializeMemory(as: UInt8.self, repeating: 0xBB)
                }
            }
            let opened = try Image.open(
                bytes: bytes, backing: [rawDisk(0xBB, 24 * size)], options: .readOnly)
            #expect(try opened.bytes(0..<24 * size) == expected)
            for _ in 0..<50 {
                let start = random.number(below: 24 * size - 1)
                let end = start + 1 + random.number(below: min(24 * size - start, 3 * size))
                #expect(try opened.bytes(start..<end) == Array(expected[start..<end]))
            }
            try opened.close()
        }
    }

    @Test("Holes are told apart subcluster by subcluster")
    func holes() throws {
        var base = ImageBuilder(byteCount: 1.MiB)
        base.fill(1, guestCluster: 1)
        var top = ImageBuilder(byteCount: 1.MiB, isExtended: true)
        top.fill(2, guestCluster: 0)
        top.setBitmap(0b100 << 32 | 0b1010, guestCluster: 0)
        top.setBitmap(0b1 << 32, guestCluster: 1)
        let image = try Image.open(
            bytes: top.build(),
            backing: [.qcow2(RecordingDevice(base.build(), yielding: false))],
            options: .readOnly)
        #expect(try image.seekData(from: 0) == 2048)
        #expect(try image.seekHole(from: 2048) == 4096)
        #expect(try image.seekData(from: 4096) == 6144)
        #expect(try image.seekHole(from: 6144) == 8192)
        // Subcluster 0 of cluster 1 hides the backing file, the others show it.
        #expect(try image.seekData(from: 8192) == 65536 + 2048)
        #expect(try image.seekHole(from: 65536 + 2048) == 131072)
        #expect(try image.seekData(from: 131072) == nil)
        try image.close()
    }
}
