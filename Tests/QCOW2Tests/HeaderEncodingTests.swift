import QCOW2
import TestSupport
import Testing

/// A header becomes the bytes that it was parsed from.
@Suite("Bytes of a header")
struct HeaderEncodingTests {
    func parse(_ bytes: [UInt8]) throws -> Header {
        try bytes.withUnsafeBytes { try Header.parse($0) }
    }

    func builder(version: UInt32 = 3) -> ImageBuilder {
        var builder = ImageBuilder(
            byteCount: 3.MiB + 512, version: version, refcountOrder: 5, extraL1Entries: 2)
        builder.compatibleFeatures = 0x81
        builder.autoclearFeatures = 0x42 & ~2
        builder.compressionType = 1
        builder.snapshot("kept")
        return builder
    }

    @Test("Every field, extension and name keeps its place", arguments: [2, 3] as [UInt32])
    func roundTrip(version: UInt32) throws {
        var builder = version == 3 ? builder() : ImageBuilder(byteCount: 3.MiB, version: 2)
        for (count, name) in [(0, nil), (1, nil), (8, "below"), (13, "b")] as [(Int, String?)] {
            builder.extensions = [
                (0x1234_5678, [UInt8](repeating: 7, count: count)), (0x8765_4321, [1]),
            ]
            builder.backingName = name
            let bytes = builder.build()
            let header = try parse(bytes)
            let fixed = version == 3 ? 112 : 72
            let end = fixed + 8 + (count + 7) / 8 * 8 + 16 + 8 + (name?.utf8.count ?? 0)
            #expect(try header.encoded() == Array(bytes.prefix(end)), "\(count)")
        }
    }

    @Test("Unknown fields and names that are no text stay as they are")
    func unknown() throws {
        var builder = builder()
        builder.headerLength = 128
        builder.backingName = "name"
        var bytes = builder.build()
        bytes.put(UInt64(0x1234), at: 112)
        bytes.put(UInt64(0x5678), at: 120)
        bytes.put([0xff, 0xfe], at: 136)
        var header = try parse(bytes)
        #expect(try header.encoded() == Array(bytes.prefix(140)))
        header.backingFile = "other"
        #expect(try header.encoded().suffix(5) == Array("other".utf8)[...])
        header.backingFile = nil
        #expect(try header.encoded().prefix(20).suffix(12).allSatisfy { $0 == 0 })
        // The oldest form of version 3 gets the field that it has not.
        builder.headerLength = 104
        builder.compressionType = 0
        builder.backingName = nil
        bytes = builder.build()
        var longer = Array(bytes.prefix(104))
        longer.put(UInt32(112), at: 100)
        #expect(try parse(bytes).encoded() == longer + [UInt8](repeating: 0, count: 16))
    }

    @Test("A new image names each feature in a record of 48 bytes")
    func featureNames() throws {
        let device = RecordingDevice([], yielding: false)
        try Image.create(on: device, size: 1 << 20, options: CreateOptions())
        let names = try device.bytes.withUnsafeBytes { try ReferenceReader($0).extensions() }
            .first { $0.type == 0x6803_f857 }
        let features: [(UInt8, UInt8, String)] = [
            (0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 2, "external data file"),
            (0, 3, "compression type"), (0, 4, "extended L2 entries"), (1, 0, "lazy refcounts"),
            (2, 0, "bitmaps"), (2, 1, "raw external data"),
        ]
        var records: [UInt8] = []
        for (kind, bit, name) in features {
            records += [kind, bit] + Array(name.utf8)
            records += [UInt8](repeating: 0, count: 46 - name.utf8.count)
        }
        #expect(names?.data == records)
    }

    @Test("It must fit in the first cluster")
    func room() throws {
        var header = try parse(ImageBuilder(byteCount: 64.KiB, clusterBits: 9).build())
        header.extensions = [
            HeaderExtension(type: 1, data: [UInt8](repeating: 0, count: 512 - 112 - 16))
        ]
        #expect(try header.encoded().count == 512)
        header.extensions[0].data.append(0)
        #expect(
            throws: FormatError.tooLarge(
                "header with its extensions and the backing file's name", value: 520, limit: 512)
        ) { try header.encoded() }
    }

    @Test("Sizes that follow from the fields")
    func derived() throws {
        var header = try parse(builder().build())
        #expect(header.clusterByteCount == 65536 && header.refcountBits == 32)
        #expect(header.l2EntryByteCount == 8 && !header.hasDataFile && !header.hasRawDataFile)
        for (size, visible) in [(3 << 20, 3 << 20), (3 << 20 | 511, 3 << 20), (512, 512), (511, 0)]
            as [(UInt64, UInt64)]
        {
            header.size = size
            #expect(header.virtualByteCount == visible)
        }
        header.incompatibleFeatures = [.extendedL2, .externalDataFile]
        header.extensions = [HeaderExtension(type: 0x4441_5441, data: Array("data".utf8))]
        #expect(header.l2EntryByteCount == 16 && header.hasDataFile && !header.hasRawDataFile)
        #expect(header.dataFileName == "data")
        header.autoclearFeatures = .rawExternalData
        #expect(header.hasRawDataFile)
        header.incompatibleFeatures = []
        #expect(!header.hasRawDataFile && header.dataFileName == nil)
    }
}
