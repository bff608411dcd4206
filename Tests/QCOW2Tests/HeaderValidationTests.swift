import QCOW2
import TestSupport
import Testing

/// The checks on opening, row by row, each on an image that is right but for one thing.
@Suite("Opening judges the header")
struct HeaderValidationTests {
    enum Verdict: Sendable, Equatable {
        case opens, notQCOW2, malformed, unsupported, markedCorrupt
        /// Refused in whatever words.
        case refused
    }

    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let verdict: Verdict
        let access: OpenOptions.Access
        let make: @Sendable () -> [UInt8]

        init(
            _ words: String, _ verdict: Verdict, access: OpenOptions.Access = .readWrite,
            version: UInt32 = 3, _ change: @escaping @Sendable (inout [UInt8]) -> Void
        ) {
            testDescription = words
            self.verdict = verdict
            self.access = access
            make = {
                var bytes = HeaderValidationTests.image(version: version).build()
                change(&bytes)
                return bytes
            }
        }

        init(_ words: String, _ verdict: Verdict, image: @escaping @Sendable () -> [UInt8]) {
            testDescription = words
            self.verdict = verdict
            access = .readWrite
            make = image
        }
    }

    static func image(version: UInt32 = 3, clusterBits: Int = 16) -> ImageBuilder {
        var image = ImageBuilder(byteCount: 1.MiB, version: version, clusterBits: clusterBits)
        image.fill(0x11, guestCluster: 0)
        return image
    }

    static let extensionArea = 112

    static func with(_ change: (inout ImageBuilder) -> Void) -> [UInt8] {
        var image = image()
        change(&image)
        return image.build()
    }

    static let cases: [Case] = [
        // Row 1: length and magic.
        Case("an untouched image, version 3", .opens) { _ in },
        Case("an untouched image, version 2", .opens, version: 2) { _ in },
        Case("an empty file", .refused) { $0 = [] },
        Case("71 bytes", .refused) { $0.removeLast($0.count - 71) },
        Case("103 bytes of version 3", .refused) { $0.removeLast($0.count - 103) },
        Case("another magic", .notQCOW2) { $0[3] = 0xFA },
        Case("zeros", .notQCOW2) { $0 = [UInt8](repeating: 0, count: 65536) },
        Case("ones", .notQCOW2) { $0 = [UInt8](repeating: 255, count: 65536) },
        // Row 2: version.
        Case("version 1", .unsupported) { $0.put(UInt32(1), at: 4) },
        Case("version 4", .unsupported) { $0.put(UInt32(4), at: 4) },
        // Row 3: cluster bits, before any shift.
        Case("cluster bits 0", .malformed) { $0.put(UInt32(0), at: 20) },
        Case("cluster bits 8", .malformed) { $0.put(UInt32(8), at: 20) },
        Case("cluster bits 22", .malformed) { $0.put(UInt32(22), at: 20) },
        Case("cluster bits 31", .malformed) { $0.put(UInt32(31), at: 20) },
        Case("cluster bits 32", .malformed) { $0.put(UInt32(32), at: 20) },
        Case("cluster bits 0xFFFFFFFF", .malformed) { $0.put(UInt32.max, at: 20) },
        // Row 4: header length.
        Case("header length 103", .malformed) { $0.put(UInt32(103), at: 100) },
        Case("header length 105", .malformed) { $0.put(UInt32(105), at: 100) },
        Case("header length over the cluster", .malformed) { $0.put(UInt32(65544), at: 100) },
        Case("header length 104", .opens, image: { with { $0.headerLength = 104 } }),
        Case(
            "header length 120 with unknown fields", .opens,
            image: {
                var bytes = with { $0.headerLength = 120 }
                bytes.put(UInt64(0x1234_5678), at: 112)
                return bytes
            }),
        // Row 5: the backing file's name.
        Case("a backing name past the cluster", .malformed) { $0.put(UInt64(65537), at: 8) },
        Case("a backing name that leaves the cluster", .malformed) {
            $0.put(UInt64(65000), at: 8)
            $0.put(UInt32(1000), at: 16)
        },
        Case("a backing name of 1024 bytes", .malformed) {
            $0.put(UInt64(4096), at: 8)
            $0.put(UInt32(1024), at: 16)
        },
        Case("a backing name inside the header", .malformed) {
            $0.put(UInt64(80), at: 8)
            $0.put(UInt32(4), at: 16)
        },
        Case("a backing length without an offset", .opens) { $0.put(UInt32.max, at: 16) },
        // Row 6: compression type and its bit.
        Case("compression bit without type", .malformed) { $0.put(UInt64(8), at: 72) },
        Case("compression type without bit", .malformed) { $0[104] = 1 },
        Case("zstd with its bit", .opens, image: { with { $0.compressionType = 1 } }),
        Case("compression type 2", .refused) {
            $0.put(UInt64(8), at: 72)
            $0[104] = 2
        },
        // Row 7: incompatible features.
        Case("incompatible bit 5", .unsupported) { $0.put(UInt64(32), at: 72) },
        Case("incompatible bit 63", .unsupported) { $0.put(UInt64(1) << 63, at: 72) },
        Case("an external data file", .refused) { $0.put(UInt64(4), at: 72) },
        Case("extended L2 entries", .opens) { $0.put(UInt64(16), at: 72) },
        Case("unknown compatible bits", .opens) { $0.put(UInt64.max & ~1, at: 80) },
        // Row 8: the corrupt bit.
        Case("corrupt, to be written", .markedCorrupt) { $0.put(UInt64(2), at: 72) },
        Case("corrupt, to be read", .opens, access: .readOnly) { $0.put(UInt64(2), at: 72) },
        // Row 9: extended L2 needs clusters of 16 KiB.
        Case(
            "extended L2 with small clusters", .refused,
            image: {
                var image = HeaderValidationTests.image(clusterBits: 12)
                image.incompatibleFeatures = 16
                return image.build()
            }),
        // Row 10: refcount width.
        Case("refcount order 7", .malformed) { $0.put(UInt32(7), at: 96) },
        Case("refcount order 0xFFFFFFFF", .malformed) { $0.put(UInt32.max, at: 96) },
        // Row 11: encryption.
        Case("AES for writing", .refused) { $0.put(UInt32(1), at: 32) },
        Case("LUKS without its extension", .refused) { $0.put(UInt32(2), at: 32) },
        Case("encryption method 3", .refused) { $0.put(UInt32(3), at: 32) },
        // Row 12: size.
        Case("size 2^63", .malformed) { $0.put(UInt64(1) << 63, at: 24) },
        Case("size over what the L1 table maps", .malformed) { $0.put(UInt64(1) << 40, at: 24) },
        Case("size 0", .opens) { $0.put(UInt64(0), at: 24) },
        // Row 13: the refcount table.
        Case("no refcount table clusters", .malformed) { $0.put(UInt32(0), at: 56) },
        Case("a refcount table over 8 MiB", .malformed) { $0.put(UInt32(129), at: 56) },
        Case("0xFFFFFFFF refcount table clusters", .malformed) { $0.put(UInt32.max, at: 56) },
        Case("an unaligned refcount table", .malformed) {
            $0.put($0.number(at: 48, as: UInt64.self) + 512, at: 48)
        },
        Case("a refcount table at 2^63", .malformed) { $0.put(UInt64(1) << 63, at: 48) },
        // Row 14: snapshots.
        Case("65537 snapshots", .malformed) { $0.put(UInt32(65537), at: 60) },
        Case("0x7FFFFFFF snapshots", .malformed) { $0.put(UInt32.max >> 1, at: 60) },
        Case("a snapshot table a byte behind a cluster's start", .malformed) {
            $0.put(UInt32(1), at: 60)
            $0.put(UInt64(65536 + 1), at: 64)
        },
        Case("an unaligned snapshot table", .malformed) {
            $0.put(UInt32(1), at: 60)
            $0.put(UInt64(65536 + 8), at: 64)
        },
        // Row 15: the L1 table.
        Case("0x7FFFFFFF L1 entries", .malformed) { $0.put(UInt32.max >> 1, at: 36) },
        Case("an L1 table over 32 MiB", .malformed) { $0.put(UInt32(4 << 20) + 1, at: 36) },
        Case("an L1 table too small for the size", .malformed) { $0.put(UInt32(0), at: 36) },
        Case("an unaligned L1 table", .malformed) { $0.put(UInt64(65536 + 8), at: 40) },
        Case("an L1 table a byte behind a cluster's start", .malformed) {
            $0.put($0.number(at: 40, as: UInt64.self) + 1, at: 40)
        },
        Case("an L1 table at 2^63", .malformed) { $0.put(UInt64(1) << 63, at: 40) },
        Case(
            "more L1 entries than needed", .opens,
            image: {
                var image = ImageBuilder(byteCount: 1.MiB, extraL1Entries: 7)
                image.fill(0x11, guestCluster: 0)
                return image.build()
            }),
        // Row 16: extensions.
        Case(
            "an unknown extension", .opens,
            image: {
                with { $0.extensions = [(0x1234_5678, [1, 2, 3])] }
            }),
        Case(
            "an extension up to the first cluster's end", .opens,
            image: {
                // The L1 table follows, which is no extension.
                var image = HeaderValidationTests.image(clusterBits: 9).build()
                image.put(UInt32(0x1234_5678), at: 112)
                image.put(UInt32(512 - 120), at: 116)
                return image
            }),
        Case(
            "an extension that ends behind the first cluster", .malformed,
            image: {
                var image = HeaderValidationTests.image(clusterBits: 9).build()
                image.put(UInt32(0x1234_5678), at: 112)
                image.put(UInt32(512), at: 116)
                return image
            }),
        Case("an extension that leaves the area", .malformed) {
            $0.put(UInt32(0x1234_5678), at: extensionArea)
            $0.put(UInt32.max >> 1, at: extensionArea + 4)
        },
        Case(
            "a bitmaps extension of 23 bytes", .malformed,
            image: {
                with {
                    $0.extensions = [(0x2385_2875, [UInt8](repeating: 0, count: 23))]
                    $0.autoclearFeatures = 1
                }
            }),
        Case("a bitmaps bit without extension", .opens) { $0.put(UInt64(1), at: 88) },
        // Row 17: the raw data bit.
        Case("the raw data bit without a data file", .refused) { $0.put(UInt64(2), at: 88) },
    ]

    @Test("an image is opened or refused in so many words", arguments: cases)
    func verdicts(_ example: Case) {
        let found: Verdict
        var words = ""
        do {
            let image = try Image.open(
                bytes: example.make(), options: OpenOptions(access: example.access))
            try image.close()
            found = .opens
        } catch {
            words = error.description
            found =
                switch error.kind {
                case .notQCOW2: .notQCOW2
                case .malformed: .malformed
                case .unsupported: .unsupported
                case .markedCorrupt: .markedCorrupt
                default: .refused
                }
        }
        if example.verdict == .refused {
            #expect(found != .opens, "it was opened")
        } else {
            #expect(found == example.verdict, "\(words)")
        }
        #expect(!words.contains("\n") && !words.hasSuffix("."))
    }

    /// Something that this version refuses, and the typed reason it must give.
    struct Refusal: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let feature: Feature
        let make: @Sendable () -> [UInt8]
    }

    static let refusals = [
        Refusal(testDescription: "version 1", feature: .version(1)) {
            var bytes = image().build()
            bytes.put(UInt32(1), at: 4)
            return bytes
        },
        Refusal(testDescription: "compression type 2", feature: .compressionType(2)) {
            var bytes = with { $0.incompatibleFeatures = 8 }
            bytes[104] = 2
            return bytes
        },
        Refusal(
            testDescription: "an unknown bit", feature: .unknownIncompatible(names: [], bits: 32)
        ) { with { $0.incompatibleFeatures = 32 } },
    ]

    @Test(
        "what is not built yet is refused by a typed error", arguments: refusals,
        [OpenOptions.Access.readOnly, .readWrite])
    func typedRefusals(_ refusal: Refusal, access: OpenOptions.Access) {
        do {
            _ = try Image.open(bytes: refusal.make(), options: OpenOptions(access: access))
            Issue.record("it was opened")
        } catch { #expect(error.kind == .unsupported(refusal.feature), "\(error)") }
    }

    @Test(
        "every refusal leaves the bytes as they were",
        arguments: cases.filter { $0.verdict != .opens })
    func leavesBytes(_ example: Case) {
        let bytes = example.make()
        let device = RecordingDevice(bytes, yielding: false)
        _ = try? Image.open(device, options: OpenOptions(access: example.access)).close()
        #expect(device.bytes == bytes)
    }

    @Test("opening read-only writes nothing, whatever is in the image")
    func readOnlyWritesNothing() throws {
        var image = Self.image()
        image.autoclearFeatures = 0x80
        image.extensions = [(0x1234_5678, [9])]
        let device = RecordingDevice(image.build(), yielding: false)
        let opened = try Image.open(device, options: .readOnly)
        #expect(try opened.bytes(0..<512) == [UInt8](repeating: 0x11, count: 512))
        try opened.close()
        #expect(device.bytes == device.initial && device.moments.isEmpty)
    }

    @Test("unknown autoclear bits are cleared before the first write, what is unknown else is kept")
    func clearsAutoclear() throws {
        var builder = Self.image()
        builder.headerLength = 120
        builder.autoclearFeatures = 0x80
        builder.compatibleFeatures = 0xF0
        builder.extensions = [(0x1234_5678, [1, 2, 3, 4, 5])]
        var bytes = builder.build()
        bytes.put(UInt64(0xABCD), at: 112)
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        try image.write([7], at: 300_000)
        try image.close()
        try device.bytes.withUnsafeBytes { after in
            let reader = try ReferenceReader(after)
            #expect(reader.autoclearFeatures == 0)
            #expect(reader.compatibleFeatures == 0xF0)
            #expect(after.number(at: 112, as: UInt64.self) == 0xABCD)
            #expect(try reader.extensions().first?.data == [1, 2, 3, 4, 5])
        }
    }

    @Test("Trap 4: an unknown incompatible bit is refused, by the name that the image gives it")
    func namesFeatures() {
        var builder = Self.image()
        builder.incompatibleFeatures = 1 << 5 | 1 << 63
        let name = Array("time travel".utf8)
        builder.extensions = [
            (0x6803_f857, [0, 5] + name + [UInt8](repeating: 0, count: 46 - name.count))
        ]
        for access in [OpenOptions.Access.readOnly, .readWrite] {
            #expect {
                try Image.open(bytes: builder.build(), options: OpenOptions(access: access))
            } throws: { error in
                let words = "\(error)"
                return words.contains("time travel") && words.contains("0x8000000000000000")
            }
        }
    }
}
