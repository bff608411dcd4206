import Glibc
import QCOW2
import TestSupport
import Testing

/// Traps 1 to 12: what a header says, and where it says it.
@Suite("Traps of the header")
struct HeaderTraps {
    @Test(
        "Trap 1: cluster bits outside of 9 to 21 are refused before anything is shifted by them",
        arguments: [0, 8, 22, 31, 32, 63, 64, 0xFFFF_FFFF] as [UInt32], [UInt32(2), 3])
    func clusterBits(_ bits: UInt32, version: UInt32) {
        var bytes = ImageBuilder(byteCount: 1.MiB, version: version).build()
        bytes.put(bits, at: 20)
        for refusal in refusals(of: bytes) {
            #expect(
                refusal
                    == .malformed(
                        .outOfRange("cluster_bits", value: UInt64(bits), allowed: "9 to 21")))
        }
    }

    @Test("Trap 2: from byte 72 on a version 2 header has extensions, which are no features")
    func version2() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, version: 2)
        builder.extensions = [(HeaderExtension.backingFormat, Array("qcow2".utf8))]
        builder.backingName = "base.qcow2"
        builder.setEntry(0x8000_0000_0000_1200, guestCluster: 9)
        let bytes = builder.build()
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 1.MiB)])
        #expect(image.header.backingFormat == "qcow2" && image.header.backingFile == "base.qcow2")
        #expect(image.header.incompatibleFeatures == [] && image.header.autoclearFeatures == [])
        #expect(image.header.refcountBits == 16 && image.header.byteCount == 72)
        #expect(image.header.compressionType == .deflate)
        // What starts a session and what marks damage write features in version 3.
        try image.write([1], at: 100_000)
        #expect(throws: ImageError.self) { try image.write([1], at: 9 * 65536) }
        try? image.close()
        #expect(Array(device.bytes[72..<512]) == Array(bytes[72..<512]))
    }

    @Test(
        "Trap 3: extensions start where header_length says, behind fields that nobody knows",
        arguments: [104, 112, 120, 200])
    func headerLength(_ length: Int) throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.headerLength = length
        builder.extensions = [
            (HeaderExtension.backingFormat, Array("raw".utf8)), (0x1234_5678, [1, 2, 3]),
        ]
        builder.backingName = "base.raw"
        var bytes = builder.build()
        // Taken for extensions these would be an end, or lengths that leave the cluster.
        for offset in stride(from: 112, to: length, by: 8) {
            bytes.put(offset % 16 == 0 ? 0 : UInt64.max, at: offset)
        }
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 1.MiB)])
        #expect(image.header.backingFormat == "raw" && image.header.backingFile == "base.raw")
        #expect(image.header.extensions.last?.data == [1, 2, 3])
        #expect(image.header.compressionType == .deflate)
        try image.write([1], at: 100_000)
        try image.close()
        #expect(Array(device.bytes[96..<512]) == Array(bytes[96..<512]))
        try expectSound(device)
    }

    @Test(
        "Trap 5: compression type 1 and incompatible bit 3 come together, or not at all",
        .needsQemuImg)
    func compressionBit() throws {
        let folder = try TemporaryDirectory()
        let content = (0..<256.KiB).map { UInt8($0 / 977 & 0xFF) }
        let raw = try folder.write(content, to: "disk.raw")
        let path = folder.file("disk.qcow2")
        try QemuImg.convert(raw, to: path, flags: ["-c", "-o", "compression_type=zstd"])
        let image = try Image.open(path, options: .readOnly)
        #expect(image.header.compressionType == .zstd)
        #expect(image.header.incompatibleFeatures.rawValue == 1 << 3)
        #expect(try image.bytes(0..<256.KiB) == content)
        try image.close()
        let file = try TestFile(path, O_RDONLY)
        let bytes = try file.read(0..<file.byteCount())
        var withoutBit = bytes
        withoutBit.put(UInt64(0), at: 72)
        var withoutType = bytes
        withoutType[104] = 0
        for refusal in refusals(of: withoutBit) + refusals(of: withoutType) {
            #expect(refusal?.isMalformed == true)
        }
    }

    @Test("Trap 5: a new zstd image has bit 3 and no other")
    func createdCompressionBit() throws {
        var options = CreateOptions()
        options.compressionType = .zstd
        let device = RecordingDevice([], yielding: false)
        try Image.create(on: device, size: 1 << 20, options: options)
        #expect(device.bytes.number(at: 72, as: UInt64.self) == 1 << 3 && device.bytes[104] == 1)
    }

    @Test(
        "Trap 8: a disk ends where its size says, be it inside of a cluster or of a sector",
        arguments: [512, 65543, 100_352, 131_071, 1.MiB + 512], [9, 16])
    func oddSizes(_ size: Int, clusterBits: Int) throws {
        let builder = ImageBuilder(byteCount: size, clusterBits: clusterBits)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 100_001)])
        let end = size / 512 * 512
        #expect(image.size == UInt64(end))
        #expect(try reads(image, 0..<min(end, 100_001), 0xBB))
        #expect(try reads(image, min(end, 100_001)..<end, 0))
        for range in [end - 512..<end + 1, end..<end + 512] {
            #expect { try image.bytes(range) } throws: { ($0 as? ImageError)?.code == EINVAL }
        }
        #expect(throws: ImageError.self) { try image.write([1], at: end) }
        try image.write([7], at: end - 1)
        try image.discard(0..<UInt64(end - 512))
        #expect(try reads(image, 0..<end - 512, 0))
        #expect(try image.bytes(end - 1..<end) == [7])
        try image.close()
        try expectSound(device)
    }

    @Test(
        "Trap 8: a new disk is rounded up to sectors, its backing file's length is not",
        .needsQemuImg)
    func createdSizes() throws {
        let device = RecordingDevice([], yielding: false)
        try Image.create(on: device, size: 1000)
        #expect(device.bytes.number(at: 24, as: UInt64.self) == 1024)
        let folder = try TemporaryDirectory()
        _ = try folder.write([UInt8](repeating: 0xBB, count: 100_001), to: "base.raw")
        let path = folder.file("top.qcow2")
        var options = CreateOptions()
        (options.backingFile, options.backingFormat) = ("base.raw", "raw")
        try Image.create(at: path, size: nil, options: options)
        let image = try Image.open(path)
        #expect(image.size == 100_352)
        try image.write([7], at: 99_999)
        try image.close()
        try QemuImg.io(
            path,
            [
                "read -q -P 0xBB 0 99999", "read -q -P 7 99999 1", "read -q -P 0xBB 100000 1",
                "read -q -P 0 100001 351",
            ])
    }

    @Test(
        "Trap 9: a disk of no bytes has no L1 table, a shrunk one has more of it than it needs",
        .needsQemuImg)
    func l1Size() throws {
        let folder = try TemporaryDirectory()
        let (empty, shrunk) = (folder.file("empty.qcow2"), folder.file("shrunk.qcow2"))
        try QemuImg.create(empty, size: 0)
        try QemuImg.create(shrunk, size: 600.MiB)
        try QemuImg.io(shrunk, ["write -q -P 5 0 64k", "write -q -P 6 599M 64k"])
        try Command.require("qemu-img", "resize", "-q", "--shrink", shrunk, "64k")
        for (path, entryCount, size) in [(empty, UInt32(0), 0), (shrunk, 2, 64.KiB)] {
            let image = try Image.open(path)
            #expect(image.header.l1EntryCount == entryCount && image.size == UInt64(size))
            #expect(try reads(image, 0..<size, 5))
            try image.resize(to: UInt64(1.MiB))
            #expect(try reads(image, size..<1.MiB, 0))
            try image.write([7], at: 1.MiB - 1)
            try image.close()
            let check = try QemuImg.check(path)
            #expect(check.status == 0, "\(check)")
            try QemuImg.io(path, ["read -q -P 7 \(1.MiB - 1) 1"])
        }
    }

    /// Where a backing file's name is said to be in an image with an extension of 64 bytes.
    struct Name: Sendable, CustomTestStringConvertible {
        let testDescription: String
        /// From the clusters' size.
        let place: @Sendable (Int) -> (offset: UInt64, byteCount: UInt32)
    }

    static let names = [
        Name(testDescription: "behind the cluster") { (UInt64($0), 1) },
        Name(testDescription: "across its end") { (UInt64($0 - 4), 8) },
        Name(testDescription: "far outside") { (UInt64($0) << 20, 8) },
        Name(testDescription: "where sums overflow") { _ in (.max - 3, 8) },
        Name(testDescription: "in the header") { _ in (80, 8) },
        Name(testDescription: "in an extension") { _ in (136, 8) },
        Name(testDescription: "in an extension's header") { _ in (116, 4) },
    ]

    @Test(
        "Trap 11: a backing file's name lies in the first cluster, behind all extensions",
        arguments: names, [9, 16])
    func nameOutside(_ name: Name, clusterBits: Int) {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: clusterBits)
        builder.extensions = [(0x1234_5678, [UInt8](repeating: 1, count: 64))]
        var bytes = builder.build()
        let place = name.place(1 << clusterBits)
        bytes.put(place.offset, at: 8)
        bytes.put(place.byteCount, at: 16)
        for refusal in refusals(of: bytes) { #expect(refusal?.isMalformed == true) }
    }

    @Test("Trap 11: a name that ends with the first cluster is read, one that is longer not made")
    func longName() throws {
        var bytes = ImageBuilder(byteCount: 64.KiB, clusterBits: 9).build()
        bytes.put(Array("base.raw".utf8), at: 504)
        bytes.put(UInt64(504), at: 8)
        bytes.put(UInt32(8), at: 16)
        let header = try Header.read(from: RecordingDevice(bytes, yielding: false))
        #expect(header.backingFile == "base.raw")
        var options = CreateOptions()
        options.clusterByteCount = 512
        (options.backingFile, options.backingFormat) = (String(repeating: "x", count: 400), "raw")
        options.opensBackingFile = false
        let device = RecordingDevice([], yielding: false)
        #expect(throws: ImageError.self) {
            try Image.create(on: device, size: 1 << 20, options: options)
        }
        #expect(device.moments.isEmpty)
    }

    @Test(
        "Trap 12: a refcount table may be longer than the image needs, up to 8 MiB",
        arguments: [(9, 2), (9, 64), (16, 2), (16, 128)])
    func longRefcountTable(clusterBits: Int, clusterCount: Int) throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: clusterBits)
        builder.fill(0x11, guestCluster: 0)
        let table = builder.allocate(byteCount: clusterCount << clusterBits)
        var bytes = builder.build()
        // The table that the builder made moves; its own cluster is free then.
        let old = Int(bytes.number(at: 48, as: UInt64.self))
        bytes.put(Array(bytes[old..<old + 1 << clusterBits]), at: table)
        bytes.put(UInt64(table), at: 48)
        bytes.put(UInt32(clusterCount), at: 56)
        let block = Int(bytes.number(at: table, as: UInt64.self))
        bytes.put(UInt16(0), at: block + old >> clusterBits * 2)
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        for cluster in 1..<16 { try image.write([UInt8(cluster)], at: cluster << clusterBits) }
        #expect(try reads(image, 0..<512, 0x11))
        try image.close()
        #expect(device.bytes.number(at: 56, as: UInt32.self) == clusterCount)
        try expectSound(device)
    }
}
