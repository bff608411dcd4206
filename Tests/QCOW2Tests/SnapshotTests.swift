import QCOW2
import TestSupport
import Testing

/// Internal snapshots: made, applied, deleted and read, judged by the tests' own reader.
@Suite("Snapshots")
struct SnapshotTests {
    /// Changes the image that `builder` makes, closes it, and hands the file to `judge`; it must
    /// have no fault and no leak.
    private func change(
        _ bytes: [UInt8], backing: [Image.Backing] = [], _ body: (Image) throws -> Void,
        judge: (ReferenceReader) throws -> Void = { _ in },
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let device = RecordingDevice(bytes, yielding: false)
        try changeImage(
            on: device, backing: backing, body,
            judge: { (reader) throws in
                #expect(reader.incompatibleFeatures & 1 == 0, sourceLocation: sourceLocation)
                #expect(Self.wrongFlags(reader) == [], sourceLocation: sourceLocation)
                try judge(reader)
            }, sourceLocation: sourceLocation)
    }

    /// Active entries without COPIED whose target has one reference: legal, but never left behind.
    private static func wrongFlags(_ reader: ReferenceReader) -> [String] {
        var wrong: [String] = []
        func look(_ raw: UInt64, _ what: String) {
            let host = Int(raw & 0x00ff_ffff_ffff_fe00)
            guard raw >> 62 & 1 == 0, host != 0, raw >> 63 == 0,
                reader.refcount(of: host / reader.clusterSize) == 1
            else { return }
            wrong.append(what)
        }
        for index in 0..<reader.active.entryCount {
            let raw = reader.number(reader.active.offset + index * 8)
            look(raw, "L1 entry \(index)")
            let table = Int(raw & 0x00ff_ffff_ffff_fe00)
            guard table != 0 else { continue }
            for entry in 0..<reader.entriesPerTable {
                look(reader.number(table + entry * 8), "L2 entry \(index)/\(entry)")
            }
        }
        return wrong
    }

    private func snapshot(_ name: String, of reader: ReferenceReader) throws
        -> ReferenceReader.Snapshot
    {
        try #require(try reader.snapshots().entries.first { $0.name == name })
    }

    /// An image with every kind of cluster.
    static func builder(clusterBits: Int = 16, refcountOrder: Int = 4, version: UInt32 = 3)
        -> ImageBuilder
    {
        var builder = ImageBuilder(
            byteCount: 64 << clusterBits, version: version, clusterBits: clusterBits,
            refcountOrder: refcountOrder)
        for cluster in 0..<8 { builder.fill(UInt8(cluster + 1), guestCluster: cluster) }
        if version == 3 {
            builder.zero(guestCluster: 8)
            builder.zeroAllocated(guestCluster: 9)
        }
        let size = builder.clusterSize
        for cluster in 10..<13 {
            builder.compress(
                [UInt8](repeating: UInt8(cluster), count: size), guestCluster: cluster)
        }
        return builder
    }

    @Test(
        "A new snapshot keeps the disk as it is, whatever is written afterwards",
        arguments: [(9, 4), (9, 3), (12, 2), (12, 6), (16, 3), (16, 4), (16, 5)],
        [2, 3] as [UInt32])
    func creates(_ layout: (Int, Int), version: UInt32) throws {
        guard version == 3 || layout.1 == 4 else { return }
        var builder = Self.builder(
            clusterBits: layout.0, refcountOrder: layout.1, version: version)
        builder.compressionType = 0
        let size = builder.clusterSize
        var before: [UInt8] = []
        try change(builder.build()) { image in
            before = try image.bytes(0..<64 * size)
            let made = try image.createSnapshot("kept", at: .init(seconds: 77, nanoseconds: 5))
            #expect(made.id == "1" && made.name == "kept")
            #expect(try image.snapshots().map(\.name) == ["kept"])
            try image.write([UInt8](repeating: 0xF0, count: 3 * size), at: size / 2)
            try image.discard(UInt64(5 * size)..<UInt64(7 * size))
            try image.write([0xF1], at: 9 * size + 3)
            try image.write([0xF2], at: 11 * size + 3)
            try image.write([0xF3], at: 40 * size)
        } judge: { (reader) throws in
            let kept = try snapshot("kept", of: reader)
            #expect(try reader.read(0..<64 * size, through: kept.table) == before)
            #expect(kept.byteCount == 64 * size)
            #expect(try reader.read(9 * size..<9 * size + 5) == [0, 0, 0, 0xF1, 0])
            #expect(try reader.read(40 * size..<40 * size + 1) == [0xF3])
        }
    }

    @Test("Applying a snapshot brings the disk back, and it can be written again")
    func applies() throws {
        let size = 65536
        var before: [UInt8] = []
        try change(Self.builder().build()) { image in
            before = try image.bytes(0..<64 * size)
            try image.createSnapshot("one")
            try image.write([UInt8](repeating: 0xEE, count: 20 * size), at: 100)
            try image.createSnapshot("two")
            try image.applySnapshot("one")
            #expect(try image.bytes(0..<64 * size) == before)
            try image.write([0x99], at: 0)
            #expect(try image.bytes(0..<2) == [0x99, 1])
        } judge: { (reader) throws in
            let one = try snapshot("one", of: reader)
            #expect(try reader.read(0..<64 * size, through: one.table) == before)
            let two = try snapshot("two", of: reader)
            #expect(
                try reader.read(100..<20 * size + 100, through: two.table)
                    .allSatisfy { $0 == 0xEE })
            #expect(try reader.read(0..<1) == [0x99])
        }
    }

    @Test("Deleting the last snapshot leaves an image without any trace of it")
    func deletes() throws {
        let size = 65536
        try change(Self.builder().build()) { image in
            try image.createSnapshot("one")
            try image.createSnapshot("two")
            try image.write([UInt8](repeating: 0xEE, count: 5 * size), at: 0)
            try image.deleteSnapshot("one")
            #expect(try image.snapshots().map(\.id) == ["2"])
            try image.deleteSnapshot("two")
            #expect(try image.snapshots().isEmpty)
            #expect(throws: ImageError.self) { try image.deleteSnapshot("two") }
            #expect(try image.bytes(0..<1) == [0xEE])
        } judge: { (reader) throws in
            #expect(try reader.snapshots().entries.isEmpty)
            #expect(try reader.read(0..<5 * size).allSatisfy { $0 == 0xEE })
        }
    }

    @Test("QEMU finds nothing wrong with what was made, applied and deleted")
    func agreesWithQEMU() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try QemuImg.create(path, size: 8.MiB, options: ["cluster_size=4096"])
        try QemuImg.io(path, ["write -q -P 1 0 1M", "write -q -P 2 3M 100k"])
        try QemuImg.snapshot(path, create: "theirs")
        try QemuImg.io(path, ["write -q -P 3 500k 1M"])
        let image = try Image.open(path)
        try image.createSnapshot("ours")
        try image.write([UInt8](repeating: 4, count: 300_000), at: 200_000)
        let after = try image.bytes(0..<8.MiB)
        try image.createSnapshot("later")
        try image.applySnapshot("theirs")
        try image.deleteSnapshot("ours")
        try image.close()
        #expect(try QemuImg.check(path).status == 0)
        let raw = folder.file("later.raw")
        try QemuImg.convert(
            path, to: raw, from: "qcow2", format: "raw", flags: ["-l", "later"])
        #expect(try TestFile(raw, 0).read(0..<8.MiB) == after)
        let check = try QemuImg.io(path, ["read -P 1 0 1M", "read -P 2 3M 100k"])
        #expect(!check.contains("failed"))
        try Command.require("qemu-img", "snapshot", "-a", "later", path)
        try Command.require("qemu-img", "snapshot", "-d", "theirs", path)
        #expect(try QemuImg.check(path).status == 0)
    }
}
