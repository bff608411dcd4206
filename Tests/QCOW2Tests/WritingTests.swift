import QCOW2
import TestSupport
import Testing

/// What writing leaves behind, judged by the tests' own reader.
@Suite("Writing")
struct WritingTests {
    private func holds(_ reader: ReferenceReader, _ range: Range<Int>, _ byte: UInt8) throws -> Bool
    {
        try reader.read(range).allSatisfy { $0 == byte }
    }

    static let layouts: [(Int, Int)] = [9, 12, 16].flatMap { bits in (0...6).map { (bits, $0) } }

    @Test("Counts of every width cover what is written", arguments: layouts)
    func everyWidth(clusterBits: Int, refcountOrder: Int) throws {
        let size = 1 << clusterBits
        var builder = ImageBuilder(
            byteCount: 600 * size, clusterBits: clusterBits, refcountOrder: refcountOrder)
        builder.fill(0x11, guestCluster: 3)
        if refcountOrder > 0 { builder.snapshot("kept") }
        try changeImage(builder) { image in
            // With 512-byte clusters and wide counts this needs many new refcount blocks.
            for cluster in 0..<600 where cluster % 5 != 4 {
                try image.write(
                    [UInt8](repeating: UInt8(cluster & 0xFF), count: size), at: cluster * size)
            }
            try image.discard(UInt64(100 * size)..<UInt64(200 * size))
        } judge: { (reader) throws in
            #expect(try holds(reader, 0..<size, 0) && holds(reader, 3 * size..<4 * size, 3))
            #expect(try holds(reader, 100 * size..<200 * size, 0))
            #expect(try holds(reader, 598 * size..<599 * size, UInt8(598 & 0xFF)))
            if let snapshot = try reader.snapshots().entries.first {
                let kept = try reader.read(3 * size..<4 * size, through: snapshot.table)
                #expect(kept.allSatisfy { $0 == 0x11 })
            }
        }
    }

    @Test("Trap 46: the refcount table grows, loses nothing and leaks nothing", arguments: [6, 4])
    func refcountTableGrows(refcountOrder: Int) throws {
        // 64 counters a block and 64 blocks a table: past 2 MiB the table itself must grow.
        let builder = ImageBuilder(
            byteCount: 6.MiB, clusterBits: 9, refcountOrder: refcountOrder)
        try changeImage(builder) { image in
            for start in stride(from: 0, to: 6.MiB, by: 256.KiB) {
                try image.write([UInt8](repeating: 0x42, count: 256.KiB), at: start)
                try image.flush()
            }
        } judge: { (reader) throws in
            #expect(try holds(reader, 0..<6.MiB, 0x42))
        }
    }

    @Test("Trap 26: a partial write takes the rest from the backing file, zeros past its end")
    func copiesFromBacking() throws {
        let builder = ImageBuilder(byteCount: 1.MiB)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 100_000)])
        try image.write([1], at: 66_000)
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let cluster = try ReferenceReader(bytes).read(65536..<131072)
            #expect(cluster[..<464].allSatisfy { $0 == 0xBB } && cluster[464] == 1)
            #expect(cluster[465..<34464].allSatisfy { $0 == 0xBB })
            #expect(cluster[34464...].allSatisfy { $0 == 0 })
        }
    }

    @Test("Trap 24: a partial write into a zero cluster is filled with zeros, not from below")
    func fillsZeroClusters() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.zero(guestCluster: 0)
        builder.zeroAllocated(guestCluster: 1, garbage: 0xEE)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 1.MiB)])
        for cluster in 0..<2 {
            try image.write([UInt8](repeating: 7, count: 512), at: cluster * 65536 + 1024)
        }
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            for start in [0, 65536] {
                let cluster = try reader.read(start..<start + 65536)
                #expect(cluster[..<1024].allSatisfy { $0 == 0 })
                #expect(cluster[1024..<1536].allSatisfy { $0 == 7 })
                #expect(cluster[1536...].allSatisfy { $0 == 0 })
            }
            #expect(reader.audit().faults == [])
        }
    }

    @Test("A partial write into a compressed cluster keeps the rest and frees the stream")
    func writesIntoCompressed() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.compress([UInt8](repeating: 0x5A, count: 65536), guestCluster: 0)
        builder.compress([UInt8](repeating: 0x5B, count: 65536), guestCluster: 1)
        try changeImage(builder) { image in
            try image.write([9], at: 10)
        } judge: { (reader) throws in
            #expect(try reader.read(9..<12) == [0x5A, 9, 0x5A])
            #expect(try holds(reader, 65536..<131072, 0x5B))
        }
    }

    @Test("A snapshot keeps its bytes whatever is written, zeroed or discarded")
    func keepsSnapshots() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        for cluster in 0..<8 { builder.fill(UInt8(cluster + 1), guestCluster: cluster) }
        builder.zeroAllocated(guestCluster: 8)
        builder.snapshot("kept")
        try changeImage(builder) { image in
            try image.write([0xFF], at: 5)
            try image.writeZeroes(65536..<131072, keepingSpace: true)
            try image.write([0xFE], at: 65536 + 7)
            try image.discard(131072..<196608)
            try image.write([0xFD], at: 8 * 65536)
        } judge: { (reader) throws in
            let snapshot = try #require(try reader.snapshots().entries.first)
            for cluster in 0..<8 {
                let kept = try reader.read(
                    cluster * 65536..<(cluster + 1) * 65536, through: snapshot.table)
                #expect(kept.allSatisfy { $0 == UInt8(cluster + 1) })
            }
            #expect(try holds(reader, 131072..<196608, 0))
            #expect(try reader.read(65536 + 6..<65536 + 9) == [0, 0xFE, 0])
        }
    }

    @Test("A discard hides the backing file in version 3")
    func discardHidesBacking() throws {
        let builder = ImageBuilder(byteCount: 1.MiB)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 1.MiB)])
        try image.discard(0..<131072)
        #expect(try image.bytes(0..<131072).allSatisfy { $0 == 0 })
        #expect(try image.bytes(131072..<131073) == [0xBB])
        try image.close()
    }

    @Test("Zeroing over a backing file writes real zeros in version 2")
    func zeroesInVersion2() throws {
        let builder = ImageBuilder(byteCount: 1.MiB, version: 2)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 1.MiB)])
        try image.writeZeroes(1000..<200_000)
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            #expect(try holds(reader, 65536..<131072, 0))
            #expect(reader.audit().faults == [])
        }
        let again = try Image.open(device, backing: [rawDisk(0xBB, 1.MiB)], options: .readOnly)
        #expect(try again.bytes(0..<1000).allSatisfy { $0 == 0xBB })
        #expect(try again.bytes(1000..<200_000).allSatisfy { $0 == 0 })
        #expect(try again.bytes(200_000..<262_144).allSatisfy { $0 == 0xBB })
        try again.close()
    }

    @Test("Growing shows zeros, also where the backing file is longer")
    func grows() throws {
        let builder = ImageBuilder(byteCount: 100_352)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 1.MiB)])
        try image.write([1], at: 100_000)
        try image.resize(to: UInt64(512.KiB))
        #expect(image.size == UInt64(512.KiB))
        #expect(try image.bytes(100_352..<512.KiB).allSatisfy { $0 == 0 })
        #expect(try image.bytes(0..<512).allSatisfy { $0 == 0xBB })
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let audit = try ReferenceReader(bytes).audit()
            #expect(audit.faults == [] && audit.leakCount == 0)
        }
    }

    @Test("Shrinking needs consent, and what is cut off does not come back")
    func shrinks() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        for cluster in 0..<16 { builder.fill(0xAA, guestCluster: cluster) }
        try changeImage(builder) { image in
            #expect(throws: ImageError.self) { try image.resize(to: 100_352) }
            try image.resize(to: 100_352, shrinking: true)
            try image.resize(to: UInt64(1.MiB))
            #expect(try image.bytes(100_352..<1.MiB).allSatisfy { $0 == 0 })
            #expect(try image.bytes(0..<100_352).allSatisfy { $0 == 0xAA })
        }
    }

    @Test("A write to an image opened read-only is refused")
    func readOnly() throws {
        let image = try Image.open(
            bytes: ImageBuilder(byteCount: 1.MiB).build(), options: .readOnly)
        #expect(image.isReadOnly)
        #expect(throws: ImageError.self) { try image.write([1], at: 0) }
        #expect(throws: ImageError.self) { try image.discard(0..<65536) }
        #expect(throws: ImageError.self) { try image.writeZeroes(0..<65536) }
        try image.close()
    }

    @Test(
        "Trap 51: a write that would land in a table is refused, and the image marked corrupt",
        arguments: [
            "header", "L1 table", "L2 table", "refcount table", "refcount block",
            "snapshot table", "snapshot's L1 table",
        ])
    func guardsMetadata(target: String) throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.fill(1, guestCluster: 0)
        builder.snapshot("kept")
        let l2 = builder.entryOffset(0)
        let probe = builder.build()
        let table = Int(probe.number(at: 48, as: UInt64.self))
        let snapshots = Int(probe.number(at: 64, as: UInt64.self))
        let host =
            switch target {
            case "header": 0
            case "L1 table": builder.l1Offset
            case "L2 table": l2
            case "refcount table": table
            case "snapshot table": snapshots
            case "snapshot's L1 table": Int(probe.number(at: snapshots, as: UInt64.self))
            default: Int(probe.number(at: table, as: UInt64.self))
            }
        builder.setEntry(UInt64(host) | 1 << 63, guestCluster: 1)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        if host != 0 {
            #expect(throws: ImageError.self) { try image.write([0x66], at: 65536) }
        } else {
            // Offset 0 is "unallocated", whatever the flag says.
            try image.write([0x66], at: 65536)
        }
        try? image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            if host != 0 { #expect(reader.incompatibleFeatures & 2 == 2) }
            #expect(try reader.read(0..<65536).allSatisfy { $0 == 1 })
        }
    }
}
