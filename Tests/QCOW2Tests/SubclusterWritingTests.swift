import Glibc
import QCOW2
import TestSupport
import Testing

/// What writing, zeroing and discarding make of extended L2 entries.
@Suite("Writing subclusters")
struct SubclusterWritingTests {
    static let cluster = 65536
    static let subcluster = 2048

    /// Changes the image that `builder` makes, closes it, and hands the file to `judge`, which has
    /// neither a fault nor a leak.
    private func change(
        _ builder: ImageBuilder, backing: UInt8? = nil, _ body: (Image) throws -> Void,
        judge: (ReferenceReader) throws -> Void, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: backing.map { [raw($0, 1.MiB)] } ?? [])
        try body(image)
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            let audit = reader.audit()
            #expect(audit.faults == [], sourceLocation: sourceLocation)
            #expect(audit.leakCount == 0, sourceLocation: sourceLocation)
            try judge(reader)
        }
    }

    private func raw(_ byte: UInt8, _ count: Int) -> Image.Backing {
        .raw(RecordingDevice([UInt8](repeating: byte, count: count), yielding: false))
    }

    private func image() -> ImageBuilder { ImageBuilder(byteCount: 1.MiB, isExtended: true) }

    private func bytes(_ byte: UInt8, subclusters count: Int) -> [UInt8] {
        [UInt8](repeating: byte, count: count * Self.subcluster)
    }

    private func range(_ subclusters: Range<Int>, of cluster: Int = 0) -> Range<UInt64> {
        let start = cluster * Self.cluster
        let end = UInt64(start + subclusters.upperBound * Self.subcluster)
        return UInt64(start + subclusters.lowerBound * Self.subcluster)..<end
    }

    /// The host offset and the bitmap of a guest cluster.
    private func entry(_ reader: ReferenceReader, _ cluster: Int = 0) throws -> (Int, UInt64) {
        let raw = try reader.rawEntry(forGuestCluster: cluster, in: reader.active)
        return (
            Int(raw & 0x00ff_ffff_ffff_fe00),
            try reader.bitmap(forGuestCluster: cluster, in: reader.active)
        )
    }

    private func holds(
        _ reader: ReferenceReader, _ subclusters: Range<Int>, of cluster: Int = 0, _ byte: UInt8,
        backing: UInt8 = 0
    ) throws -> Bool {
        let range = range(subclusters, of: cluster)
        return try reader.read(Int(range.lowerBound)..<Int(range.upperBound)) { _, part in
            part.initializeMemory(as: UInt8.self, repeating: backing)
        }.allSatisfy { $0 == byte }
    }

    // MARK: Writing

    @Test("A write into a new cluster writes and allocates its subclusters only")
    func writesSubclusters() throws {
        var written = 0
        let device = RecordingDevice(image().build(), yielding: false)
        let opened = try Image.open(device, backing: [raw(0xBB, 1.MiB)])
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
        try change(image(), backing: 0xBB) { image in
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
        try change(image(), backing: 0xBB) { image in
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
        try change(builder, backing: 0xBB) { image in
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
        try change(builder, backing: 0x11) { image in
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
        try change(builder) { image in
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
        try change(builder, backing: 0xBB) { image in
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
        try change(builder, backing: 0xBB) { image in
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
        try change(builder) { image in
            try image.write(bytes(7, subclusters: 1), at: 4096)
        } judge: { (reader) throws in
            #expect(try entry(reader).1 == 0xFFFF_FFFF)
            #expect(try holds(reader, 0..<2, 0x5C) && holds(reader, 2..<3, 7))
            #expect(try holds(reader, 3..<32, 0x5C))
        }
    }

    // MARK: Zeroing

    @Test("Zeroing subclusters keeps the cluster for the others", arguments: [false, true])
    func zeroesSubclusters(keepingSpace: Bool) throws {
        var builder = image()
        let host = builder.fill(0x22, guestCluster: 0)
        try change(builder, backing: 0xBB) { image in
            try image.writeZeroes(range(4..<6), keepingSpace: keepingSpace)
            // Less than a subcluster is written.
            try image.writeZeroes(
                UInt64(10 * 2048 + 100)..<UInt64(12 * 2048 + 100), keepingSpace: keepingSpace)
        } judge: { (reader) throws in
            #expect(try entry(reader).0 == host)
            #expect(
                try entry(reader).1 == (0b11_0000 | 1 << 11) << 32
                    | (0xFFFF_FFFF & ~0b1000_0011_0000))
            #expect(try holds(reader, 3..<4, 0x22) && holds(reader, 4..<6, 0))
            let bytes = try reader.read(10 * 2048..<13 * 2048)
            #expect(bytes[..<100].allSatisfy { $0 == 0x22 })
            #expect(bytes[100..<2 * 2048 + 100].allSatisfy { $0 == 0 })
            #expect(bytes[(2 * 2048 + 100)...].allSatisfy { $0 == 0x22 })
        }
    }

    @Test("A cluster whose last data is discarded is given back")
    func freesEmptyClusters() throws {
        var builder = image()
        builder.fill(0x22, guestCluster: 0)
        builder.setBitmap(0b1111, guestCluster: 0)
        builder.fill(0x33, guestCluster: 1)
        builder.fill(0x44, guestCluster: 2)
        builder.setBitmap(0, guestCluster: 2)
        try change(builder, backing: 0xBB) { image in
            try image.discard(range(0..<2))
            try image.discard(range(2..<4))
            try image.discard(range(0..<32, of: 1))
            try image.discard(range(0..<32, of: 2))
            try image.discard(range(0..<32, of: 3))
        } judge: { (reader) throws in
            #expect(try entry(reader, 0) == (0, 0b1111 << 32))
            for cluster in 1..<4 { #expect(try entry(reader, cluster) == (0, ~0 << 32)) }
            #expect(try holds(reader, 0..<4, 0, backing: 0xBB))
            #expect(try holds(reader, 4..<32, 0xBB, backing: 0xBB))
        }
    }

    @Test("Zeroing that keeps space keeps the cluster, even of all subclusters")
    func keepsSpace() throws {
        var builder = image()
        let host = builder.fill(0x22, guestCluster: 0)
        try change(builder) { image in
            try image.writeZeroes(0..<65536, keepingSpace: true)
        } judge: { (reader) throws in
            #expect(try entry(reader) == (host, ~0 << 32))
        }
    }

    @Test(
        "Trap 23: zeroed and discarded subclusters hide the backing file", arguments: [true, false])
    func hidesBacking(discards: Bool) throws {
        try change(image(), backing: 0xBB) { image in
            let ranges = [range(3..<5), range(0..<32, of: 1), range(30..<32, of: 2)]
            for range in ranges {
                if discards { try image.discard(range) } else { try image.writeZeroes(range) }
            }
        } judge: { (reader) throws in
            #expect(try entry(reader, 0) == (0, 0b11000 << 32))
            #expect(try entry(reader, 1) == (0, ~0 << 32))
            #expect(try holds(reader, 3..<5, 0, backing: 0xBB))
            #expect(try holds(reader, 5..<32, 0xBB, backing: 0xBB))
            #expect(try holds(reader, 0..<32, of: 1, 0, backing: 0xBB))
            #expect(try holds(reader, 30..<32, of: 2, 0, backing: 0xBB))
        }
    }

    @Test("A discard without a backing file makes no table and no entry")
    func discardsNothing() throws {
        let before = image().build()
        let device = RecordingDevice(before, yielding: false)
        let opened = try Image.open(device)
        try opened.discard(0..<UInt64(1.MiB))
        try opened.discard(range(3..<5))
        try opened.close()
        #expect(device.bytes == before)
    }

    @Test("A part of a compressed cluster is zeroed by writing")
    func zeroesCompressed() throws {
        var builder = image()
        for cluster in 0..<2 {
            builder.compress([UInt8](repeating: 0x5C, count: 65536), guestCluster: cluster)
        }
        try change(builder) { image in
            try image.writeZeroes(range(4..<6))
            try image.writeZeroes(range(0..<32, of: 1))
        } judge: { (reader) throws in
            #expect(try entry(reader).1 == 0xFFFF_FFFF)
            #expect(try entry(reader, 1) == (0, ~0 << 32))
            #expect(try holds(reader, 0..<4, 0x5C) && holds(reader, 4..<6, 0))
            #expect(try holds(reader, 6..<32, 0x5C))
        }
    }

    @Test("The end of the disk counts as the end of its cluster")
    func endOfDisk() throws {
        var builder = ImageBuilder(byteCount: 65536 + 5 * 2048 + 512, isExtended: true)
        builder.fill(0x22, guestCluster: 1)
        try change(builder) { image in
            try image.discard(65536..<image.size)
        } judge: { (reader) throws in
            #expect(try entry(reader, 1) == (0, ~0 << 32))
        }
        // Less than the last subcluster, of which the disk has 512 bytes.
        try change(builder) { image in
            try image.writeZeroes(image.size - 100..<image.size)
        } judge: { (reader) throws in
            let end = reader.byteCount
            #expect(try reader.read(end - 512..<end - 100).allSatisfy { $0 == 0x22 })
            #expect(try reader.read(end - 100..<end).allSatisfy { $0 == 0 })
        }
    }

    // MARK: Space

    @Test("Allocating gives a cluster space, and what it reads stays")
    func allocates() throws {
        var builder = image()
        builder.setBitmap(0b1 << 32, guestCluster: 0)
        try change(builder, backing: 0xBB) { image in
            try image.allocate(0..<65536 * 2)
        } judge: { (reader) throws in
            #expect(try entry(reader, 0).0 != 0 && entry(reader, 0).1 == 0b1 << 32)
            #expect(try entry(reader, 1).0 != 0 && entry(reader, 1).1 == 0)
            #expect(try holds(reader, 0..<1, 0, backing: 0xBB))
            #expect(try holds(reader, 1..<32, 0xBB, backing: 0xBB))
        }
        try change(image()) { image in
            try image.allocate(0..<65536)
        } judge: { (reader) throws in
            #expect(try entry(reader).0 != 0 && entry(reader).1 == ~0 << 32)
        }
    }

    @Test("Allocated bytes are counted by subclusters, as they change")
    func counts() throws {
        var builder = image()
        builder.fill(0x22, guestCluster: 0)
        builder.setBitmap(0b10 << 32 | 0b1101, guestCluster: 0)
        builder.compress([UInt8](repeating: 1, count: 65536), guestCluster: 1)
        builder.setBitmap(0b1 << 32, guestCluster: 2)
        let device = RecordingDevice(builder.build(), yielding: false)
        let base = [UInt8](repeating: 0xBB, count: 4 * 65536)
        let opened = try Image.open(
            device, backing: [.raw(RecordingDevice(base, yielding: false))])
        opened.startCountingAllocation()
        // Data and zeros with space, and what shows through.
        let start = UInt64(65536 + 65536 + 31 * 2048 + 65536)
        for _ in 0..<500 where opened.allocatedByteCount != start { usleep(10_000) }
        #expect(opened.allocatedByteCount == start)
        try opened.write([1], at: 5 * 65536)
        #expect(opened.allocatedByteCount == start + 2048)
        // Zero subclusters of a cluster keep their space.
        try opened.discard(range(4..<6))
        #expect(opened.allocatedByteCount == start + 2048)
        try opened.discard(range(0..<32))
        #expect(opened.allocatedByteCount == start + 2048 - 65536)
        try opened.close()
    }

    @Test("Growing and shrinking keep what an extended image promises")
    func resizes() throws {
        var builder = image()
        for cluster in 0..<16 { builder.fill(0xAA, guestCluster: cluster) }
        builder.setBitmap(0b1, guestCluster: 15)
        try change(builder, backing: 0xBB) { image in
            try image.resize(to: 100_352, shrinking: true)
            try image.resize(to: UInt64(2.MiB))
            #expect(try image.bytes(100_352..<2.MiB).allSatisfy { $0 == 0 })
            #expect(try image.bytes(0..<100_352).allSatisfy { $0 == 0xAA })
        } judge: { (reader) throws in
            #expect(
                try reader.read(100_352..<1.MiB) { _, part in
                    part.initializeMemory(as: UInt8.self, repeating: 0xBB)
                }.allSatisfy { $0 == 0 })
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
        let image = try Image.open(device, backing: [raw(0xBB, byteCount - 3 * size)])
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
