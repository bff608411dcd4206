import QCOW2
import TestSupport
import Testing

/// What writing makes of extended L2 entries.
@Suite("Writing subclusters")
struct SubclusterWritingTests: SubclusterSuite {
    @Test("A write into a new cluster writes and allocates its subclusters only")
    func writesSubclusters() throws {
        var written = 0
        let device = RecordingDevice(image().build(), yielding: false)
        let opened = try Image.open(device, backing: base)
        let before = device.moments.count
        try opened.write(bytes(7, subclusters: 2), at: 3 * Self.subcluster)
        for case .write(_, let offset, let bytes) in device.moments[before...]
        where offset % Self.cluster == 3 * Self.subcluster {
            written += bytes.count
        }
        #expect(written == 2 * Self.subcluster)
        try opened.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            #expect(try entry(reader).1 == 0b11000)
            #expect(try holds(reader, 0..<3, 0xBB, backing: 0xBB))
            #expect(try holds(reader, 3..<5, 7, backing: 0xBB))
            #expect(try holds(reader, 5..<32, 0xBB, backing: 0xBB))
        }
    }

    @Test("Only the partial first and last subcluster are filled")
    func fillsPartialSubclusters() throws {
        try changeImage(image(), backing: base) { image in
            try image.write([UInt8](repeating: 7, count: 5000), at: 1000)
        } judge: { (reader) throws in
            #expect(try entry(reader).1 == 0b111)
            let cluster = try reader.read(0..<8192)
            #expect(cluster[..<1000].allSatisfy { $0 == 0xBB })
            #expect(cluster[1000..<6000].allSatisfy { $0 == 7 })
            #expect(cluster[6000..<6144].allSatisfy { $0 == 0xBB })
        }
    }

    @Test("A write over several clusters keeps what lies outside of it unallocated")
    func writesOverClusters() throws {
        try changeImage(image(), backing: base) { image in
            try image.write(
                [UInt8](repeating: 7, count: 2 * Self.cluster), at: 30 * Self.subcluster + 512)
        } judge: { (reader) throws in
            #expect(try entry(reader, 0).1 == 0xC000_0000)
            #expect(try entry(reader, 1).1 == 0xFFFF_FFFF)
            #expect(try entry(reader, 2).1 == 0x7FFF_FFFF)
            #expect(try holds(reader, 31..<32, of: 2, 0xBB, backing: 0xBB))
        }
    }

    @Test("A write into reserved or zero subclusters of an own cluster stays in the cluster")
    func exposes() throws {
        var builder = image()
        let host = builder.fill(0xEE, guestCluster: 0)
        builder.setBitmap(0b1100 << 32 | 0b1, guestCluster: 0)
        try changeImage(builder, backing: base) { image in
            // Across zero subclusters 2 and 3 and unallocated ones: the parts not written are
            // zeros there, and the backing file's bytes here.
            try image.write([UInt8](repeating: 7, count: 2048), at: 3 * 2048 + 1024)
            try image.write([1], at: 20 * 2048 + 100)
        } judge: { (reader) throws in
            #expect(try entry(reader).0 == host)
            #expect(try entry(reader).1 == 0b0100 << 32 | 0b11001 | 1 << 20)
            let cluster = try reader.read(0..<65536)
            #expect(cluster[3 * 2048..<3 * 2048 + 1024].allSatisfy { $0 == 0 })
            #expect(cluster[3 * 2048 + 1024..<4 * 2048 + 1024].allSatisfy { $0 == 7 })
            #expect(cluster[4 * 2048 + 1024..<5 * 2048].allSatisfy { $0 == 0xBB })
            #expect(cluster[20 * 2048] == 0xBB && cluster[20 * 2048 + 100] == 1)
            #expect(cluster[20 * 2048 + 101..<21 * 2048].allSatisfy { $0 == 0xBB })
        }
    }

    @Test("Trap 24: a partial write into a zero subcluster is filled with zeros, not from below")
    func fillsZeroSubclusters() throws {
        var builder = image()
        builder.zero(guestCluster: 0)
        builder.zeroAllocated(guestCluster: 1)
        try changeImage(builder, backing: [rawDisk(0x11, 1.MiB)]) { image in
            for cluster in 0..<2 {
                try image.write([UInt8](repeating: 7, count: 512), at: cluster * 65536 + 1024)
            }
        } judge: { (reader) throws in
            for cluster in 0..<2 {
                let bytes = try reader.read(cluster * 65536..<(cluster + 1) * 65536)
                #expect(bytes[..<1024].allSatisfy { $0 == 0 })
                #expect(bytes[1024..<1536].allSatisfy { $0 == 7 })
                #expect(bytes[1536...].allSatisfy { $0 == 0 })
                #expect(try entry(reader, cluster).1 == 0xFFFF_FFFE_0000_0001)
            }
        }
    }

    @Test("Trap 25: a written subcluster loses its zero bit, in memory and on disk")
    func clearsZeroBits() throws {
        var builder = image()
        builder.zeroAllocated(guestCluster: 0)
        try changeImage(builder) { image in
            for index in 0..<32 {
                try image.write(bytes(UInt8(index + 1), subclusters: 1), at: index * 2048)
                #expect(try image.bytes(index * 2048..<index * 2048 + 1) == [UInt8(index + 1)])
            }
        } judge: { (reader) throws in
            #expect(try entry(reader).1 == 0xFFFF_FFFF)
            for index in 0..<32 { #expect(try holds(reader, index..<index + 1, UInt8(index + 1))) }
        }
    }

    @Test("Trap 52: what a snapshot shares is copied, and only what is allocated in it")
    func copiesShared() throws {
        var builder = image()
        let host = builder.fill(0x22, guestCluster: 0)
        builder.setBitmap(0b100 << 32 | 0b1110_0011, guestCluster: 0)
        builder.zeroAllocated(guestCluster: 1)
        builder.snapshot("kept")
        try changeImage(builder, backing: base) { image in
            try image.write([UInt8](repeating: 7, count: 100), at: 10 * 2048)
            try image.writeZeroes(65536..<65536 + 4096, keepingSpace: true)
            try image.write([9], at: 65536)
        } judge: { (reader) throws in
            let moved = try entry(reader)
            #expect(moved.0 != host)
            #expect(moved.1 == 0b100 << 32 | 0b100_1110_0011)
            #expect(try holds(reader, 0..<2, 0x22, backing: 0xBB))
            #expect(try holds(reader, 2..<3, 0, backing: 0xBB))
            #expect(try holds(reader, 3..<5, 0xBB, backing: 0xBB))
            #expect(try holds(reader, 5..<8, 0x22, backing: 0xBB))
            #expect(try holds(reader, 11..<32, 0xBB, backing: 0xBB))
            let snapshot = try #require(try reader.snapshots().entries.first).table
            #expect(
                try reader.bitmap(forGuestCluster: 0, in: snapshot) == 0b100 << 32 | 0b1110_0011)
            #expect(try reader.read(0..<4096, through: snapshot).allSatisfy { $0 == 0x22 })
            #expect(try reader.read(65536..<131072, through: snapshot).allSatisfy { $0 == 0 })
        }
    }

    @Test("Trap 32: bit 63 of a bitmap is a zero bit, not COPIED, when a shared table is copied")
    func copiesTables() throws {
        var builder = image()
        builder.fill(0x22, guestCluster: 0)
        builder.setBitmap(1 << 63 | 0b1, guestCluster: 0)
        builder.setBitmap(~0 << 32, guestCluster: 1)
        builder.snapshot("kept")
        try changeImage(builder, backing: base) { image in
            try image.write([1], at: 5 * 65536)
            #expect(try image.bytes(31 * 2048..<65536).allSatisfy { $0 == 0 })
        } judge: { (reader) throws in
            #expect(try entry(reader, 0).1 == 1 << 63 | 0b1)
            #expect(try entry(reader, 1).1 == ~0 << 32)
        }
    }

    @Test("A write into a compressed cluster copies the whole of it")
    func writesIntoCompressed() throws {
        var builder = image()
        builder.compress([UInt8](repeating: 0x5C, count: 65536), guestCluster: 0)
        try changeImage(builder) { image in
            try image.write(bytes(7, subclusters: 1), at: 4096)
        } judge: { (reader) throws in
            #expect(try entry(reader).1 == 0xFFFF_FFFF)
            #expect(try holds(reader, 0..<2, 0x5C) && holds(reader, 2..<3, 7))
            #expect(try holds(reader, 3..<32, 0x5C))
        }
    }

    // MARK: Entries that make no sense

    @Test(
        "A write that meets an impossible entry fails, marks the image corrupt and ends writing",
        arguments: [
            "allocated and zero", "allocated without a cluster", "compressed with a bitmap",
            "misaligned",
        ], ["write", "zero", "discard", "part"])
    func stopsWriting(entry: String, operation: String) throws {
        var builder = image()
        switch entry {
        case "allocated and zero":
            builder.fill(0x22, guestCluster: 0)
            builder.setBitmap(1 << 63 | 1 << 31, guestCluster: 0)
        case "allocated without a cluster": builder.setBitmap(1 << 7, guestCluster: 0)
        case "compressed with a bitmap":
            builder.compress([UInt8](repeating: 1, count: 65536), guestCluster: 0)
            builder.setBitmap(1 << 40, guestCluster: 0)
        default:
            let host = builder.fill(0x22, guestCluster: 0)
            builder.setEntry(UInt64(host + 2048) | 1 << 63, guestCluster: 0)
        }
        builder.fill(0x33, guestCluster: 1)
        let device = RecordingDevice(builder.build(), yielding: false)
        let opened = try Image.open(device)
        #expect {
            switch operation {
            case "write": try opened.write([1], at: 3 * 2048)
            case "zero": try opened.writeZeroes(0..<65536, keepingSpace: true)
            case "part": try opened.writeZeroes(range(2..<4))
            default: try opened.discard(0..<65536)
            }
        } throws: { ($0 as? ImageError)?.code == 5 }
        #expect(throws: ImageError.self) { try opened.write([1], at: 65536) }
        #expect(try opened.bytes(65536..<131072).allSatisfy { $0 == 0x33 })
        try? opened.close()
        try device.bytes.withUnsafeBytes { bytes in
            let features = try ReferenceReader(bytes).incompatibleFeatures
            #expect(features & 2 == 2)
        }
    }

    // MARK: Anything

    @Test(
        "Random changes leave what the model says, no fault and no leak", arguments: [14, 16, 17])
    func random(clusterBits: Int) throws {
        let seed = TestEnvironment.seed &+ UInt64(clusterBits)
        var random = RepeatableRandom(seed: seed)
        let size = 1 << clusterBits
        let byteCount = 20 * size + 1536
        var builder = ImageBuilder(
            byteCount: byteCount, clusterBits: clusterBits, isExtended: true)
        for cluster in 0..<8 { builder.fill(UInt8(cluster + 1), guestCluster: cluster) }
        builder.setBitmap(0x00FF_0000_F000_00F0, guestCluster: 2)
        builder.setBitmap(0, guestCluster: 3)
        builder.compress([UInt8](repeating: 0x5C, count: size), guestCluster: 9)
        builder.snapshot("kept")
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, byteCount - 3 * size)])
        var model = try image.bytes(0..<byteCount)
        let kept = model
        for step in 0..<600 {
            let count = 1 + random.number(below: random.chance(oneIn: 3) ? 2 * size : 3000)
            let start = random.number(below: byteCount - count + 1)
            let place = UInt64(start)..<UInt64(start + count)
            let zeros = [UInt8](repeating: 0, count: count)
            switch random.number(below: 8) {
            case 0..<4:
                let bytes = [UInt8](repeating: UInt8(1 + step % 255), count: count)
                try image.write(bytes, at: start)
                model.put(bytes, at: start)
            case 4:
                try image.discard(place)
                model.put(zeros, at: start)
            case 5:
                try image.writeZeroes(place, keepingSpace: random.chance(oneIn: 2))
                model.put(zeros, at: start)
            case 6: try image.allocate(place)
            default: try image.flush()
            }
            let end = min(start + count + 5000, byteCount)
            let near = max(0, start - 5000)..<end
            try #require(
                try image.bytes(near) == Array(model[near]), "seed \(seed), step \(step)")
        }
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            let audit = reader.audit()
            #expect(audit.faults == [] && audit.leakCount == 0, "seed \(seed)")
            let table = try #require(try reader.snapshots().entries.first).table
            for (table, expected) in [(reader.active, model), (table, kept)] {
                let found = try reader.read(0..<byteCount, through: table) { offset, part in
                    for index in part.indices {
                        part[index] = offset + index < byteCount - 3 * size ? 0xBB : 0
                    }
                }
                #expect(found == expected, "seed \(seed)")
            }
        }
    }
}
