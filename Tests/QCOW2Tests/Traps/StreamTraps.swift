import Glibc
import QCOW2
import TestSupport
import Testing

/// Traps 28 to 30: where a compressed cluster's stream ends, and which host clusters it touches.
@Suite("Traps of compressed clusters")
struct StreamTraps {
    private static let cluster = 4096

    private static func entry(_ offset: Int, sectors: Int) -> UInt64 {
        1 << 62 | UInt64(sectors - 1) << 58 | UInt64(offset)
    }

    private static let stream = Streams.deflate([UInt8](repeating: 0x5C, count: cluster))

    @Test("Trap 28: a stream's room ends with its last sector, so its neighbour is not its own")
    func lastSector() throws {
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 12)
        _ = builder.entryOffset(0)
        let host = builder.allocate(byteCount: 2 * Self.cluster)
        let start = host + Self.cluster - 100
        builder.put(Self.stream, at: start)
        builder.setEntry(Self.entry(start, sectors: 1), guestCluster: 0)
        builder.put([UInt8](repeating: 0x22, count: Self.cluster), at: host + Self.cluster)
        builder.setEntry(UInt64(host + Self.cluster) | 1 << 63, guestCluster: 1)
        let device = RecordingDevice(builder.build(), yielding: false)
        try expectSound(device)
        let image = try Image.open(device)
        #expect(try reads(image, 0..<Self.cluster, 0x5C))
        // Drops the stream: were a cluster too many freed, the next writes would take it.
        try image.write([0x77], at: 0)
        try image.flush()
        for cluster in 2..<50 { try image.write([0x99], at: cluster * Self.cluster) }
        #expect(try reads(image, Self.cluster..<2 * Self.cluster, 0x22))
        try image.close()
        try expectSound(device)
    }

    @Test("Trap 28: a stream that starts inside of the file's last sector is read to its end")
    func lastSectorOfFile() throws {
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 12)
        let place = builder.entryOffset(0)
        var bytes = builder.build()
        let content = [UInt8](repeating: 0xEE, count: 412) + Self.stream
        let host = bytes.appendCounted(content, clusterBits: 12)
        bytes.put(Self.entry(host + 412, sectors: 1), at: place)
        bytes.put([UInt8](repeating: 0, count: host + 512 - bytes.count), at: bytes.count)
        let image = try Image.open(bytes: bytes, options: .readOnly)
        #expect(try reads(image, 0..<Self.cluster, 0x5C))
        try image.close()
    }

    @Test("Trap 29: the file may end with the last byte of a stream", arguments: [UInt8(0), 1])
    func endsWithStream(type: UInt8) throws {
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 12)
        builder.compressionType = type
        let content = (0..<Self.cluster).map { UInt8($0 / 3 & 0xFF) }
        let stream = type == 0 ? Streams.deflate(content) : Streams.zstd(content)
        let place = builder.entryOffset(0)
        var bytes = builder.build()
        let host = bytes.appendCounted(stream, clusterBits: 12)
        let sectors = (stream.count + 511) / 512
        bytes.put(Self.entry(host, sectors: sectors), at: place)
        let device = RecordingDevice(bytes, yielding: false)
        #expect(device.bytes.count == host + stream.count)
        let image = try Image.open(device)
        #expect(try image.bytes(0..<Self.cluster) == content)
        try image.write([1], at: Self.cluster)
        #expect(try image.bytes(0..<Self.cluster) == content)
        try image.write([2], at: 0)
        #expect(try image.bytes(1..<Self.cluster) == Array(content[1...]))
        try image.close()
        try expectSound(device)
    }

    @Test(
        "Trap 29: a file that ends with the last byte in use is read and written",
        .needsQemuImg, arguments: [false, true])
    func endsBetweenSectors(bypassesPageCache: Bool) throws {
        // O_DIRECT reads whole blocks, of which the last is short.
        let folder = try TemporaryDirectory(in: "/tmp")
        let content = (0..<300_032).map { UInt8($0 * 7 / 11 & 0xFF) }
        let raw = try folder.write(content, to: "disk.raw")
        let path = folder.file("disk.qcow2")
        try QemuImg.convert(raw, to: path, flags: ["-c"])
        let file = try TestFile(path, O_RDWR)
        let bytes = try file.read(0..<file.byteCount())
        let length = try #require(bytes.lastIndex { $0 != 0 }) + 1
        try file.truncate(to: length)
        #expect(length % 512 != 0)
        let image = try Image.open(
            path, options: OpenOptions(bypassesPageCache: bypassesPageCache))
        #expect(try image.bytes(0..<content.count) == content)
        try image.write([0xFF], at: 299_000)
        try image.close()
        try QemuImg.io(path, ["read -q -P 0xFF 299000 1"])
        #expect(try QemuImg.check(path).status == 0)
    }

    @Test("Trap 29: an L2 table may end with the file, as far as it has entries")
    func endsWithTables() throws {
        let builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 12)
        var bytes = builder.build()
        // Ten bytes of data, and behind them a table of which only the first entry is there.
        let data = bytes.appendCounted([UInt8](repeating: 1, count: 10), clusterBits: 12)
        let l2 = bytes.appendCounted([UInt8](repeating: 0, count: 8), clusterBits: 12)
        bytes.put(UInt64(data) | 1 << 63, at: l2)
        bytes.put(UInt64(l2) | 1 << 63, at: builder.l1Offset)
        #expect(bytes.count == l2 + 8)
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        #expect(try reads(image, 0..<10, 1))
        #expect(try reads(image, 10..<256.KiB, 0))
        try image.write([2], at: 100.KiB)
        #expect(try reads(image, 10..<100.KiB, 0))
        try image.close()
        try expectSound(device)
    }

    @Test(
        "Trap 30: a stream has a reference to every host cluster that its sectors touch",
        arguments: ["overwritten", "discarded", "zeroed"])
    func threeClusters(what: String) throws {
        // 8 KiB of room from the last sector of one host cluster on reach into the third.
        let content = (0..<Self.cluster).map { UInt8($0 * 13 / 7 & 0xFF) }
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 12)
        _ = builder.entryOffset(0)
        let host = builder.allocate(byteCount: 3 * Self.cluster)
        let start = host + Self.cluster - 512
        builder.put(Streams.deflate(content, level: 0), at: start)
        builder.setEntry(Self.entry(start, sectors: 16), guestCluster: 0)
        builder.fill(0x22, guestCluster: 1)
        let device = RecordingDevice(builder.build(), yielding: false)
        try expectSound(device, "as it is")
        let image = try Image.open(device)
        #expect(try image.bytes(0..<Self.cluster) == content)
        #expect(try image.bytes(4000..<4096) == Array(content[4000...]))
        switch what {
        case "overwritten":
            try image.write([1], at: 0)
            #expect(try image.bytes(1..<Self.cluster) == Array(content[1...]))
        case "discarded": try image.discard(0..<4096)
        default: try image.writeZeroes(0..<4096, keepingSpace: true)
        }
        try image.close()
        // Nothing of the three is still counted, nothing beside them was.
        try expectSound(device, what)
        let counts = try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            return (0..<3).map { reader.refcount(of: host / Self.cluster + $0) }
        }
        // What replaces the stream was allocated before the stream was freed.
        #expect(counts == [0, 0, 0])
    }
}
