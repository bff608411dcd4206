import Glibc
import QCOW2
import Synchronization
import TestSupport
import Testing

/// Snapshots beside clients, in odd images, and with failures.
@Suite("Snapshot traps")
struct SnapshotTrapTests {
    // MARK: Beside clients

    @Test(
        "Snapshots made while clients write show one moment, and nothing leaks", arguments: [9, 12])
    func besideClients(clusterBits: Int) throws {
        let regionSize = 256.KiB
        let builder = filled(3 * regionSize, clusterBits: clusterBits)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        let isDone = Atomic(false)
        try onThreads(4) { index in
            defer { if index == 3 { isDone.store(true, ordering: .releasing) } }
            guard index < 3 else { return try Self.takeSnapshots(of: image) }
            var random = RepeatableRandom(seed: UInt64(index) + TestEnvironment.seed)
            var number: UInt64 = 0
            while !isDone.load(ordering: .acquiring) {
                number += 1
                // First the far sector, then the near one: the far one is never older.
                let start = index * regionSize / 512
                try Self.write(number, sector: start + 8 + random.number(below: 400), image)
                try Self.write(number, sector: start + 4, image)
                try Self.write(number, sector: start, image)
                if random.chance(oneIn: 9) {
                    let hole = UInt64(start + 420) * 512
                    try image.discard(hole..<hole + UInt64(20 * 512))
                }
                if random.chance(oneIn: 20) { try image.flush() }
            }
        }
        try image.close()
        try expectSound(device)
    }

    private static func write(_ number: UInt64, sector: Int, _ image: Image) throws {
        try image.write(
            SectorPattern.bytes(sectors: sector..<sector + 1, value: number), at: sector * 512)
    }

    private static func takeSnapshots(of image: Image) throws {
        for round in 0..<6 {
            usleep(20_000)
            try image.createSnapshot("s\(round)")
            let view = try image.openSnapshot("s\(round)")
            for region in 0..<3 {
                let start = region * 512
                func value(_ sector: Int) throws -> UInt64 {
                    let bytes = try view.bytes(sector * 512..<(sector + 1) * 512)
                    return bytes.withUnsafeBytes {
                        SectorPattern.value(of: $0, sector: sector) ?? 0
                    }
                }
                let (far, near) = (try value(start + 4), try value(start))
                guard far == near || far == near + 1 else {
                    Issue.record("round \(round): \(far) was written before \(near)")
                    continue
                }
            }
            #expect(throws: ImageError.self) { try image.deleteSnapshot("s\(round)") }
            try view.close()
            if round % 3 == 2 { try image.deleteSnapshot("s\(round - 1)") }
        }
    }

    @Test("A view of a snapshot reads its bytes while the disk is written, zeroed and discarded")
    func view() throws {
        let builder = filled(1.MiB, clusterBits: 12)
        let device = RecordingDevice(builder.build(), yielding: false)
        try opened(device) { image in
            let before = try image.bytes(0..<1.MiB)
            try image.createSnapshot("kept")
            let view = try image.openSnapshot("kept")
            try image.write([UInt8](repeating: 0xEE, count: 512.KiB), at: 0)
            try image.discard(UInt64(512.KiB)..<UInt64(1.MiB))
            try image.flush()
            #expect(try view.bytes(0..<1.MiB) == before)
            #expect(view.isReadOnly)
            try view.close()
            try image.deleteSnapshot("kept")
        }
        try expectSound(device)
    }

    // MARK: Counts

    @Test("Trap 48: counters too narrow for a snapshot are refused, and nothing changes")
    func narrow() throws {
        for order in [0, 1] {
            let builder = filled(64.KiB, clusterBits: 9, refcountOrder: order)
            let device = RecordingDevice(builder.build(), yielding: false)
            try opened(device) { image in
                let allowed = order == 0 ? 0 : 2
                for round in 0..<allowed { try image.createSnapshot("s\(round)") }
                let before = device.bytes
                #expect(throws: ImageError.self) { try image.createSnapshot("one too many") }
                #expect(try image.snapshots().count == allowed)
                if order == 1 { #expect(device.bytes == before) }
                try image.write([1], at: 3)
            }
            try expectSound(device)
        }
    }

    @Test("Trap 54: overwriting a shared cluster changes two counts and no table of the snapshot")
    func overwriting() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        let host = builder.fill(0x11, guestCluster: 3)
        let device = RecordingDevice(builder.build(), yielding: false)
        try opened(device) { image in
            try image.createSnapshot("kept")
            try image.write([0x22], at: 3 * 65536)
        }
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            #expect(reader.refcount(of: host / 65536) == 1)
            let kept = try #require(try reader.snapshots().entries.first)
            let raw = try reader.rawEntry(forGuestCluster: 3, in: kept.table)
            #expect(raw == UInt64(host))
            #expect(reader.number(kept.table.offset) >> 63 == 0)
            let active = try reader.rawEntry(forGuestCluster: 3, in: reader.active)
            #expect(active >> 63 == 1)
        }
        try expectSound(device)
    }

    @Test("Trap 52: a zeroed cluster that a snapshot shares is not written in place")
    func zeroedAndShared() throws {
        let builder = filled(64.KiB, clusterBits: 12)
        let device = RecordingDevice(builder.build(), yielding: false)
        try opened(device) { image in
            let before = try image.bytes(0..<64.KiB)
            try image.createSnapshot("kept")
            try image.writeZeroes(0..<16384, keepingSpace: true)
            try image.write([UInt8](repeating: 0x77, count: 9000), at: 100)
            let view = try image.openSnapshot("kept")
            #expect(try view.bytes(0..<64.KiB) == before)
            try view.close()
        }
        try expectSound(device)
    }

    // MARK: Tables

    @Test("Trap 56: long names, odd bytes, unknown extra data and missing padding survive")
    func oddTable() throws {
        let extra = 1000
        var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
        builder.fill(1, guestCluster: 0)
        builder.snapshot(String(repeating: "n", count: 65535), extraLength: extra)
        builder.snapshot("last", extraLength: 16)
        let device = RecordingDevice(builder.build(), yielding: false)
        let before = try device.bytes.withUnsafeBytes {
            try ReferenceReader($0).snapshots().entries[0]
        }
        try opened(device) { image in
            try image.createSnapshot("new")
            try image.deleteSnapshot("last")
            #expect(try image.snapshots().map(\.id) == ["1", "3"])
        }
        try device.bytes.withUnsafeBytes { bytes in
            let entries = try ReferenceReader(bytes).snapshots().entries
            #expect(entries.count == 2)
            #expect(entries[0].extra == before.extra && entries[0].name == before.name)
        }
        try expectSound(device)
    }

    @Test("Trap 14: an image whose snapshot table cannot be read opens nothing half")
    func brokenTable() throws {
        var builder = filled(64.KiB, clusterBits: 12)
        builder.snapshot("kept")
        var bytes = builder.build()
        let table = Int(bytes.number(at: 64, as: UInt64.self))
        bytes.put(UInt64(0x123), at: table)  // its L1 table is not aligned
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device, options: .readOnly)
        #expect(throws: ImageError.self) { try image.openSnapshot("kept") }
        #expect(throws: ImageError.self) { try image.openSnapshot("none") }
        try image.close()
        #expect(device.bytes == bytes)
    }

    @Test("Trap 9, 13: names, counts and sizes that cannot be are refused")
    func refusals() throws {
        let device = RecordingDevice(filled(64.KiB, clusterBits: 12).build(), yielding: false)
        try opened(device) { image in
            for name in ["", String(repeating: "x", count: 256)] {
                #expect(throws: ImageError.self) { try image.createSnapshot(name) }
            }
            #expect(throws: ImageError.self) { try image.resize(to: 1000) }
            #expect(throws: ImageError.self) { try image.resize(to: 1 << 62) }
            try image.resize(to: 0, shrinking: true)
            try image.createSnapshot("empty")
            try image.resize(to: UInt64(64.KiB))
            try image.write([1], at: 4000)
            try image.applySnapshot("empty")
            #expect(image.size == 0)
            try image.resize(to: UInt64(64.KiB))
            #expect(try image.bytes(0..<64.KiB).allSatisfy { $0 == 0 })
            try image.deleteSnapshot("empty")
        }
        try expectSound(device)
    }

    @Test("Trap 35: VM state is kept and counted, never shown, and stays with its snapshot")
    func vmState() throws {
        // 512-byte clusters: a table covers 32 KiB, so the state begins at the second one.
        var builder = ImageBuilder(byteCount: 16.KiB, clusterBits: 9, extraL1Entries: 3)
        builder.fill(0x11, guestCluster: 0)
        builder.fill(0xEE, guestCluster: 64)
        builder.fill(0xEF, guestCluster: 130)
        builder.snapshot("with state")
        let device = RecordingDevice(builder.build(), yielding: false)
        try opened(device) { image in
            let view = try image.openSnapshot("with state")
            #expect(view.size == UInt64(16.KiB))
            try view.close()
            try image.createSnapshot("without")
            try image.resize(to: UInt64(100.KiB))
            #expect(try image.bytes(16.KiB..<100.KiB).allSatisfy { $0 == 0 })
            try image.applySnapshot("with state")
            #expect(image.size == UInt64(16.KiB))
            try image.resize(to: UInt64(100.KiB))
            #expect(try image.bytes(16.KiB..<100.KiB).allSatisfy { $0 == 0 })
        }
        try expectSound(device)
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            let kept = try #require(try reader.snapshots().entries.first)
            #expect(try reader.read(64 * 512..<65 * 512, through: kept.table).first == 0xEE)
            #expect(try reader.read(130 * 512..<131 * 512, through: kept.table).first == 0xEF)
        }
        try opened(device) { try $0.deleteSnapshot("with state") }
        try expectSound(device)
    }

    // MARK: Failures

    @Test(
        "Whatever call fails while a snapshot is made, applied or deleted, the image is whole",
        arguments: [FaultyDevice.Kind.write, .read, .flush], [false, true])
    func faults(kind: FaultyDevice.Kind, lasts: Bool) throws {
        var builder = filled(64.KiB, clusterBits: 9)
        builder.snapshot("old")
        let bytes = builder.build()
        var call = 0
        var hasFailed = true
        while hasFailed, call < 300 {
            let device = RecordingDevice(bytes, yielding: false)
            let faulty = FaultyDevice(device, .init(kind, call: call, lasts: lasts))
            do {
                let image = try Image.open(faulty)
                do {
                    try image.write([1, 2, 3], at: 700)
                    try image.createSnapshot("new")
                    try image.write([4, 5, 6], at: 5000)
                    try image.applySnapshot("old")
                    try image.deleteSnapshot("new")
                } catch {}
                try image.close()
            } catch {}
            hasFailed = faulty.failed
            try device.bytes.withUnsafeBytes { state in
                let reader = try ReferenceReader(state)
                try #require(reader.audit().faults == [], "\(kind) \(call), lasts: \(lasts)")
                let old = try #require(try reader.snapshots().entries.first { $0.name == "old" })
                try #require(try reader.read(0..<512, through: old.table)[0] == 1)
            }
            call += call < 40 ? 1 : 5
        }
    }
}
