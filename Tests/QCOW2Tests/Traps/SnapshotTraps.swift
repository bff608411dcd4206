import QCOW2
import TestSupport
import Testing

/// Traps 48 and 54: what a snapshot does to counts.
@Suite("Traps of snapshots and counts")
struct SnapshotTraps {
    @Test(
        "Trap 48: a snapshot that narrow counts have no room for is refused and changes no count",
        arguments: [(0, 0), (1, 2), (2, 14)])
    func narrowCounts(refcountOrder: Int, room: Int) throws {
        var builder = ImageBuilder(
            byteCount: 128.KiB, clusterBits: 9, refcountOrder: refcountOrder)
        for cluster in stride(from: 0, to: 200, by: 7) {
            builder.fill(UInt8(cluster + 1), guestCluster: cluster)
        }
        builder.zeroAllocated(guestCluster: 250)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        for number in 0..<room { try image.createSnapshot("snapshot \(number)") }
        for _ in 0..<3 {
            #expect(throws: ImageError.self) { try image.createSnapshot("one too many") }
        }
        #expect(try image.snapshots().count == room)
        // Whoever is refused can go on, and all is as it was.
        try image.write([0xFF], at: 100_000)
        #expect(try reads(image, 7 * 512..<8 * 512, 8))
        try image.close()
        try expectSound(device)
        let again = try Image.open(device, options: .readOnly)
        #expect(try again.snapshots().count == room)
        try again.close()
    }

    @Test("Trap 48: streams that fill a host cluster's count leave no room for a snapshot of it")
    func sharedStreams() throws {
        var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 12, refcountOrder: 2)
        for cluster in 0..<9 {
            builder.compress(
                [UInt8](repeating: UInt8(cluster + 1), count: 4096), guestCluster: cluster)
        }
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        // Nine references become eighteen, a count has four bits.
        #expect(throws: ImageError.self) { try image.createSnapshot("too many") }
        for cluster in 0..<4 { try image.write([0xFF], at: cluster * 4096) }
        try image.flush()
        try image.createSnapshot("fits")
        #expect(try reads(image, 8 * 4096..<9 * 4096, 9))
        try image.close()
        try expectSound(device)
    }

    @Test("Trap 54: a copy of an L2 table changes no count but those of the two tables")
    func copiedTables() throws {
        var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
        let hosts = (0..<4).map { builder.fill(UInt8($0 + 1), guestCluster: $0) }
        let stream = builder.compress([UInt8](repeating: 0x5C, count: 4096), guestCluster: 5)
        let table = builder.entryOffset(0)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        for name in ["first", "second"] { try image.createSnapshot(name) }
        try image.write([0xFF], at: 2 * 4096)
        try image.flush()
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            // One cluster and its table left the three that share everything else.
            #expect(hosts.map { reader.refcount(of: $0 >> 12) } == [3, 3, 2, 3])
            #expect(reader.refcount(of: stream >> 12) == 3)
            #expect(reader.refcount(of: table >> 12) == 2)
            let slot = reader.number(reader.active.offset)
            let own = Int(slot & 0x00ff_ffff_ffff_fe00)
            #expect(slot >> 63 == 1 && own != table && reader.refcount(of: own >> 12) == 1)
            for index in [0, 1, 3] {
                let entry = try reader.rawEntry(forGuestCluster: index, in: reader.active)
                #expect(entry == UInt64(hosts[index]), "entry \(index) is COPIED, or elsewhere")
            }
            for snapshot in try reader.snapshots().entries {
                #expect(
                    try reader.read(2 * 4096..<3 * 4096, through: snapshot.table)
                        .allSatisfy { $0 == 3 })
            }
        }
        try expectSound(device)
    }
}
