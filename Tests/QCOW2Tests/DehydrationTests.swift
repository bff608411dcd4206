import QCOW2
import TestSupport
import Testing

@Suite("Metadata without guest data")
struct DehydrationTests {
    /// What every guest byte of these tests is made of.
    private static let secret = Array("GUESTDATA-NOBODYELSES-EYES------".utf8)

    private static func secrets(_ count: Int) -> [UInt8] {
        (0..<count).map { secret[$0 % secret.count] }
    }

    /// An image with everything that has a table.
    private static func image(_ clusterBits: Int = 12, isExtended: Bool = false) -> ImageBuilder {
        var image = ImageBuilder(
            byteCount: 2.MiB, clusterBits: isExtended ? 14 : clusterBits, isExtended: isExtended)
        for cluster in 0..<40 where cluster % 7 != 3 {
            image.write(secrets(image.clusterSize), guestCluster: cluster)
        }
        image.snapshot("first")
        image.write(secrets(image.clusterSize), guestCluster: 5)
        image.zeroAllocated(guestCluster: 6, garbage: UInt8(ascii: "G"))
        image.compress(secrets(image.clusterSize), guestCluster: 90)
        image.bitmap("bits", bits: [0xff, 3, 0, 9])
        return image
    }

    private func dehydrated(
        _ bytes: [UInt8], redacting: Bool = false
    ) throws -> (skeleton: [UInt8], summary: Dehydration.Summary) {
        let out = RecordingDevice([], yielding: false)
        var dehydration = Dehydration()
        dehydration.redactsNames = redacting
        let summary = try dehydration.run(RecordingDevice(bytes, yielding: false), to: out)
        #expect(summary.byteCount == UInt64(out.bytes.count))
        return (out.bytes, summary)
    }

    private func rehydrated(_ skeleton: [UInt8]) throws -> [UInt8] {
        let image = RecordingDevice([], yielding: false)
        try Rehydration.run(RecordingDevice(skeleton, yielding: false), to: image)
        return image.bytes
    }

    private func findings(_ bytes: [UInt8]) throws -> ([String], ImageCheck) {
        var findings: [String] = []
        let check = try ImageCheck(RecordingDevice(bytes, yielding: false)) {
            findings.append($0.description)
        }
        return (findings, check)
    }

    /// Whether four bytes of the secret in a row are anywhere.
    private func leaks(_ bytes: [UInt8]) -> Int? {
        let pieces = Set(
            (0..<Self.secret.count).map { start in
                (0..<4).reduce(UInt32(0)) {
                    $0 << 8 | UInt32(Self.secret[(start + $1) % Self.secret.count])
                }
            })
        var window: UInt32 = 0
        for (index, byte) in bytes.enumerated() {
            window = window << 8 | UInt32(byte)
            if index >= 3, pieces.contains(window), window != 0x2d2d_2d2d { return index }
        }
        return nil
    }

    @Test(
        "the image that comes back has the same tables, counts and names", arguments: [9, 12, 16])
    func tables(clusterBits: Int) throws {
        let bytes = Self.image(clusterBits).build()
        let (skeleton, summary) = try dehydrated(bytes)
        #expect(summary.omittedEntryCount == 0 && summary.notes == [])
        #expect(skeleton.count < bytes.count / 4)
        let again = try rehydrated(skeleton)
        #expect(again.count == bytes.count)
        #expect(leaks(again) == nil)
        #expect(try findings(again) == findings(bytes))
        #expect(try findings(again).0 == [])
        let device = RecordingDevice(again, yielding: false)
        let header = try Header.read(from: device)
        #expect(try header == Header.read(from: RecordingDevice(bytes, yielding: false)))
        #expect(try header.readSnapshots(from: device).snapshots.map(\.name) == ["first"])
        #expect(try header.readBitmaps(from: device).map(\.name) == ["bits"])
        let image = try Image.open(bytes: again, options: .readOnly)
        #expect(try reads(image, 0..<again.count.clamped(to: 65536), 0))
        try image.close()
    }

    @Test("subclusters are kept")
    func subclusters() throws {
        let bytes = Self.image(isExtended: true).build()
        let again = try rehydrated(dehydrated(bytes).skeleton)
        #expect(leaks(again) == nil)
        #expect(try findings(again) == findings(bytes))
    }

    @Test("what lies behind a table in its cluster does not come along")
    func slack() throws {
        let image = Self.image(16)
        var bytes = image.build()
        let snapshots = Int(bytes.number(at: 64, as: UInt64.self))
        let directory = Int(bytes.number(at: 112 + 24, as: UInt64.self))
        // Behind the header, the L1 table, the snapshot table and the bitmap directory.
        for place in [
            2048, image.l1Offset + image.l1EntryCount * 8, snapshots + 256, directory + 64,
        ] {
            bytes.put(Self.secrets(4096), at: place)
        }
        let again = try rehydrated(dehydrated(bytes).skeleton)
        #expect(leaks(again) == nil)
        #expect(try findings(again) == findings(bytes))
    }

    @Test("names stay, unless they are redacted")
    func names() throws {
        var image = Self.image(16)
        image.backingName = "customer-name.qcow2"
        image.extensions = [(0xe279_2aca, Array("qcow2".utf8))]
        let bytes = image.build()
        let kept = try Header.read(
            from: RecordingDevice(rehydrated(dehydrated(bytes).skeleton), yielding: false))
        #expect(kept.backingFile == "customer-name.qcow2")
        let device = RecordingDevice(
            try rehydrated(dehydrated(bytes, redacting: true).skeleton), yielding: false)
        let redacted = try Header.read(from: device)
        #expect(redacted.backingFile == "aaaaaaaaaaaaaaaaaaa" && redacted.backingFormat == "qcow2")
        #expect(try redacted.readSnapshots(from: device).snapshots.map(\.name) == ["aaaaa"])
        #expect(try redacted.readBitmaps(from: device).map(\.name) == ["aaaa"])
    }

    @Test("damaged pointers lead to no guest data", arguments: 0..<40)
    func damage(run: Int) throws {
        var random = RepeatableRandom(seed: TestEnvironment.seed &+ UInt64(run))
        let image = Self.image([9, 12, 16][run % 3], isExtended: run % 8 == 7)
        var bytes = image.build()
        let sound = bytes
        // Tables that now point anywhere, most of all to guest data.
        let fields = [40, 48, 64, 36, 56, 60, 8, 112 + 24]
        for _ in 0..<1 + run % 6 {
            let target = UInt64.random(in: 0..<UInt64(bytes.count), using: &random)
            let aligned = target & ~UInt64(image.clusterSize - 1)
            switch Int.random(in: 0..<5, using: &random) {
            case 0:
                let field = fields[Int.random(in: 0..<fields.count, using: &random)]
                if field == 36 || field >= 56 && field < 64 {
                    bytes.put(UInt32.random(in: 0...5000, using: &random), at: field)
                } else {
                    bytes.put(aligned, at: field)
                }
            case 1:
                let table = Int(sound.number(at: 48, as: UInt64.self))
                bytes.put(aligned, at: table)
            case 2: bytes.put(aligned | 1 << 63, at: image.l1Offset)
            case 3: bytes.put(target, at: image.l1Offset)
            default:
                let table = Int(sound.number(at: image.l1Offset, as: UInt64.self) & 0xffff_ffff)
                let entry = table + Int.random(in: 0..<40, using: &random) * image.entrySize
                bytes.put(UInt64.random(in: 0...(.max), using: &random), at: entry)
            }
        }
        let again = try rehydrated(dehydrated(bytes).skeleton)
        #expect(again.count == bytes.count)
        if let place = leaks(again) {
            Issue.record("run \(run): guest data at \(place): \(again[place - 3..<place + 16])")
        }
    }

    @Test(
        "a header that makes no sense is kept as far as it goes",
        arguments: [4, 20, 24, 36, 40, 56, 100])
    func header(field: Int) throws {
        var bytes = Self.image(16).build()
        bytes.put(UInt32.max, at: field)
        let again = try rehydrated(dehydrated(bytes).skeleton)
        #expect(again.count == bytes.count)
        #expect(again[..<72] == bytes[..<72])
        #expect(leaks(again) == nil)
        #expect(refusals(of: again) == refusals(of: bytes))
    }

    @Test("a skeleton that is cut short or changed is refused, whatever it is")
    func damagedSkeleton() throws {
        let (skeleton, _) = try dehydrated(Self.image().build())
        for count in [0, 7, 23, 24, 39, skeleton.count / 2, skeleton.count - 1] {
            #expect(throws: ImageError.self) { try rehydrated(Array(skeleton[..<count])) }
        }
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        for _ in 0..<200 {
            var changed = skeleton
            let place = Int.random(in: 0..<changed.count, using: &random)
            changed[place] ^= UInt8.random(in: 1...255, using: &random)
            // A longer file is a sparse one; here it would be memory.
            if (8..<24).contains(place) { continue }
            do { _ = try rehydrated(changed) } catch { #expect(error is ImageError) }
        }
    }
}

extension Int {
    fileprivate func clamped(to most: Int) -> Int { Swift.min(self, most) }
}
