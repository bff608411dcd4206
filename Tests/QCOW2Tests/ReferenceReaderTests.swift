import Glibc
import TestSupport
import Testing

/// The judge is judged first: what qemu-img makes it must read, what the builder makes qemu-img
/// must find clean, and damage it must see.
@Suite("The tests' own reader", .needsQemuImg)
struct ReferenceReaderTests {
    struct Layout: Sendable, CustomTestStringConvertible {
        let clusterSize: Int
        let version: Int
        let refcountBits: Int
        var testDescription: String { "\(clusterSize) B, v\(version), \(refcountBits) bits" }
        var options: [String] {
            [
                "cluster_size=\(clusterSize)", "compat=\(version == 2 ? "0.10" : "1.1")",
                "refcount_bits=\(refcountBits)",
            ]
        }
    }

    static let layouts: [Layout] = [512, 4096, 65536, 2 << 20].flatMap { clusterSize in
        [Layout(clusterSize: clusterSize, version: 2, refcountBits: 16)]
            + [1, 2, 4, 8, 16, 32, 64].map {
                Layout(clusterSize: clusterSize, version: 3, refcountBits: $0)
            }
    }

    @Test("reads and counts what qemu-img makes, whatever the layout", arguments: layouts)
    func readsQEMU(_ layout: Layout) throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        let size = max(256.KiB, 8 * layout.clusterSize)
        try QemuImg.create(image, size: size, options: layout.options)
        var commands = ["write -P 0x11 0 100k", "write -P 0x22 123k 9k", "discard 16k 32k"]
        if layout.version == 3 { commands.append("write -z 64k 16k") }
        try QemuImg.io(image, commands)
        if layout.refcountBits > 1 {
            try QemuImg.snapshot(image, create: "one")
            try QemuImg.io(image, ["write -P 0x33 8k 50k"])
        }
        let raw = folder.file("disk.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        let reference = try ReferenceImage(image)
        #expect(try reference.firstDifference(from: ReferenceDisk(contentsOf: raw)) == nil)
        let audit = try reference.qcow2.audit()
        #expect(audit.faults == [])
        #expect(audit.leakCount == 0)
    }

    @Test(
        "inflates what qemu-img compresses", arguments: [512, 4096, 65536, 2 << 20],
        [
            "zlib", "zstd",
        ])
    func readsCompressed(clusterSize: Int, type: String) throws {
        let folder = try TemporaryDirectory()
        let raw = folder.file("disk.raw")
        let model = ReferenceDisk(byteCount: 4.MiB)
        var random = RepeatableRandom(seed: 7)
        for offset in stride(from: 0, to: model.byteCount, by: 8) {
            model.bytes.storeBytes(
                of: random.next() & 0xff00ff, toByteOffset: offset, as: UInt64.self)
        }
        try model.save(to: raw)
        let image = folder.file("disk.qcow2")
        try QemuImg.convert(
            raw, to: image,
            flags: [
                "-c", "-o", "cluster_size=\(clusterSize),compression_type=\(type)",
            ])
        let reference = try ReferenceImage(image)
        #expect(try reference.firstDifference(from: model) == nil)
        #expect(try reference.qcow2.audit().faults == [])
    }

    /// An image with every kind of cluster and a snapshot.
    static func sample(version: UInt32, clusterBits: Int, refcountOrder: Int) -> ImageBuilder {
        var image = ImageBuilder(
            byteCount: 40 << clusterBits, version: version, clusterBits: clusterBits,
            refcountOrder: refcountOrder)
        image.fill(0xA1, guestCluster: 0)
        image.fill(0xA2, guestCluster: 3)
        image.compress([UInt8](repeating: 0xC1, count: 1 << clusterBits), guestCluster: 5)
        image.compress([UInt8](repeating: 0xC2, count: 1 << clusterBits), guestCluster: 6)
        if version == 3 {
            image.zero(guestCluster: 7)
            image.zeroAllocated(guestCluster: 8)
        }
        if refcountOrder > 1 {
            image.snapshot("before")
            image.fill(0xA3, guestCluster: 12)
            image.fill(0xA4, guestCluster: 3)
        }
        return image
    }

    @Test("qemu-img finds the builder's images clean and reads the same", arguments: layouts)
    func builderIsRight(_ layout: Layout) throws {
        let folder = try TemporaryDirectory()
        let bits = layout.clusterSize.trailingZeroBitCount
        let bytes = Self.sample(
            version: UInt32(layout.version), clusterBits: bits,
            refcountOrder: layout.refcountBits.trailingZeroBitCount
        ).build()
        let image = try folder.write(bytes, to: "built.qcow2")
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
        let raw = folder.file("disk.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        let reference = try ReferenceImage(image)
        let model = try ReferenceDisk(contentsOf: raw)
        #expect(try reference.firstDifference(from: model) == nil)
        #expect(model.bytes[5 << bits] == 0xC1 && model.bytes[6 << bits] == 0xC2)
        #expect(try reference.qcow2.audit().faults == [])
        #expect(try reference.qcow2.audit().leakCount == 0)
    }

    static func firstFault(_ bytes: [UInt8]) throws -> String {
        try bytes.withUnsafeBytes { try ReferenceReader($0).audit().faults.first ?? "none" }
    }

    @Test("sees a count below the references")
    func seesLowCount() throws {
        var image = ImageBuilder(byteCount: 1.MiB)
        let host = image.fill(1, guestCluster: 0)
        image.count(host..<host + 1, by: ~0)
        let bytes = image.build()
        #expect(try Self.firstFault(bytes).hasPrefix("I1"))
    }

    @Test("sees COPIED on a cluster with two references")
    func seesCopied() throws {
        var image = ImageBuilder(byteCount: 1.MiB)
        let host = image.fill(1, guestCluster: 0)
        image.setEntry(UInt64(host), guestCluster: 1)
        image.count(host..<host + 1, by: 1)
        let bytes = image.build()
        #expect(try Self.firstFault(bytes).hasPrefix("I2"))
    }

    @Test("sees an entry that points past the end of the file")
    func seesPastEnd() throws {
        var image = ImageBuilder(byteCount: 1.MiB)
        image.setEntry(1 << 40, guestCluster: 1)
        let bytes = image.build()
        #expect(try Self.firstFault(bytes).hasPrefix("I3"))
    }
}
