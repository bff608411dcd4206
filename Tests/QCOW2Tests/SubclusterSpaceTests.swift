import Glibc
import QCOW2
import TestSupport
import Testing

/// What zeroing, discarding, allocating and resizing make of extended L2 entries.
@Suite("Space of subclusters")
struct SubclusterSpaceTests: SubclusterSuite {
    // MARK: Zeroing

    @Test("Zeroing subclusters keeps the cluster for the others", arguments: [false, true])
    func zeroesSubclusters(keepingSpace: Bool) throws {
        var builder = image()
        let host = builder.fill(0x22, guestCluster: 0)
        try changeImage(builder, backing: base) { image in
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
        try changeImage(builder, backing: base) { image in
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
        try changeImage(builder) { image in
            try image.writeZeroes(0..<65536, keepingSpace: true)
        } judge: { (reader) throws in
            #expect(try entry(reader) == (host, ~0 << 32))
        }
    }

    @Test(
        "Trap 23: zeroed and discarded subclusters hide the backing file", arguments: [true, false])
    func hidesBacking(discards: Bool) throws {
        try changeImage(image(), backing: base) { image in
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
        try changeImage(builder) { image in
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
        try changeImage(builder) { image in
            try image.discard(65536..<image.size)
        } judge: { (reader) throws in
            #expect(try entry(reader, 1) == (0, ~0 << 32))
        }
        // Less than the last subcluster, of which the disk has 512 bytes.
        try changeImage(builder) { image in
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
        try changeImage(builder, backing: base) { image in
            try image.allocate(0..<65536 * 2)
        } judge: { (reader) throws in
            #expect(try entry(reader, 0).0 != 0 && entry(reader, 0).1 == 0b1 << 32)
            #expect(try entry(reader, 1).0 != 0 && entry(reader, 1).1 == 0)
            #expect(try holds(reader, 0..<1, 0, backing: 0xBB))
            #expect(try holds(reader, 1..<32, 0xBB, backing: 0xBB))
        }
        try changeImage(image()) { image in
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
        try changeImage(builder, backing: base) { image in
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
}
