import QCOW2
import TestSupport
import Testing

/// Entries that claim metadata for guest data.
@Suite("Guarded metadata")
struct GuardedMetadataTests {
    enum Place: CaseIterable, Sendable {
        case l1Table, l2Table, refcountTable, refcountBlock, snapshotTable, snapshotL1
        case bitmapDirectory, bitmapTable

        /// The host offset of the first cluster of it.
        func offset(in reader: ReferenceReader) throws -> Int {
            func word(_ offset: Int) -> Int {
                Int(reader.bytes.number(at: offset, as: UInt64.self) & 0x00ff_ffff_ffff_fe00)
            }
            return switch self {
            case .l1Table: reader.active.offset
            case .l2Table: word(reader.active.offset)
            case .refcountTable: reader.refcountTableOffset
            case .refcountBlock: word(reader.refcountTableOffset)
            case .snapshotTable: reader.snapshotsOffset
            case .snapshotL1: try reader.snapshots().entries[0].table.offset
            case .bitmapDirectory:
                Int(try #require(try reader.bitmapsExtension()).number(at: 16, as: UInt64.self))
            case .bitmapTable:
                word(try Place.bitmapDirectory.offset(in: reader))
            }
        }
    }

    /// An image with a snapshot, a bitmap, and an L2 table that is the disk's own.
    private func image() throws -> [UInt8] {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 12)
        for cluster in 0..<8 { builder.fill(UInt8(cluster + 1), guestCluster: cluster) }
        builder.bitmap("dirty", bits: [1])
        let device = RecordingDevice(builder.build(), yielding: false)
        try changeImage(on: device) { image in
            try image.createSnapshot("kept")
            try image.write([UInt8](repeating: 9, count: 4096), at: 5 * 4096)
        }
        return device.bytes
    }

    @Test("A write never lands in metadata that an entry points to", arguments: Place.allCases)
    func refused(_ place: Place) throws {
        var bytes = try image()
        let (target, entry) = try bytes.withUnsafeBytes { raw in
            let reader = try ReferenceReader(raw)
            return (try place.offset(in: reader), try Place.l2Table.offset(in: reader) + 5 * 8)
        }
        #expect(target % 4096 == 0 && target > 0)
        #expect(bytes[entry] == 0x80)
        bytes.put(UInt64(target) | 1 << 63, at: entry)
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        #expect(throws: ImageError.self) {
            try image.write([UInt8](repeating: 0xEE, count: 4096), at: 5 * 4096)
        }
        try? image.close()
        #expect(!device.bytes.dropFirst(target).prefix(4096).contains(0xEE))
    }

    @Test("A table that comes later is guarded too, wherever it lies", arguments: 10..<20)
    func laterTables(bits: UInt64) throws {
        let map = try MapChangeTests.map(ImageBuilder(byteCount: 256.KiB, clusterBits: 9))
        let guarded = try MetadataGuard(map: map, tableCount: 8)
        let cluster = UInt64(1) << bits
        func isGuarded(_ cluster: UInt64) -> Bool { guarded.overlaps(cluster * 512 + 511, 1) }
        #expect(!isGuarded(cluster))
        map.replaceTable(3, by: cluster * 512, clearingCopied: false)
        guarded.addTable(cluster)
        guarded.addRefcountBlock(cluster + 2)
        guarded.add(ClusterRun(first: cluster + 4, count: 2))
        let found = (0..<8 as Range<UInt64>).map { isGuarded(cluster + $0) }
        #expect(found == [true, false, true, false, true, true, false, false])
    }
}
