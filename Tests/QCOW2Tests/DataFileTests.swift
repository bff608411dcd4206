import QCOW2
import TestSupport
import Testing

/// Images whose guest data lies in an external data file.
@Suite("External data files")
struct DataFileTests {
    /// An image with `entries`, whatever they are, over a data file full of 0xDD.
    private func open(
        _ entries: [Int: UInt64], isRaw: Bool = false, clusterBits: Int = 16,
        options: OpenOptions = OpenOptions()
    ) throws -> (image: Image, file: RecordingDevice, data: RecordingDevice) {
        var builder = ImageBuilder(byteCount: 16 << clusterBits, clusterBits: clusterBits)
        builder.incompatibleFeatures = 4
        builder.autoclearFeatures = isRaw ? 2 : 0
        for (cluster, entry) in entries { builder.setEntry(entry, guestCluster: cluster) }
        let file = RecordingDevice(builder.build(), yielding: false)
        let data = RecordingDevice(
            [UInt8](repeating: 0xDD, count: 16 << clusterBits), yielding: false)
        return (try Image.open(file, dataFile: data, options: options), file, data)
    }

    private static let copied: UInt64 = 1 << 63

    @Test("Guest data lies in the data file at its own offset", arguments: [false, true])
    func identity(raw: Bool) throws {
        let pair = try DataFilePair(raw: raw)
        let image = try pair.open()
        try image.write([UInt8](repeating: 7, count: 1000), at: 70_000)
        try image.write([8], at: 0)
        try image.close()
        #expect(pair.data.bytes[70_000..<71_000].allSatisfy { $0 == 7 } && pair.data.bytes[0] == 8)
        #expect(pair.data.bytes.count == 1.MiB)
        #expect(try pair.entry(0) == Self.copied)
        #expect(try pair.entry(1) == Self.copied | 65536)
        #expect(try pair.entry(2) == (raw ? Self.copied | 131072 : 0))
        #expect(try pair.bytes(70_000..<71_000).allSatisfy { $0 == 7 })
        let again = try pair.open(.readOnly)
        #expect(try again.bytes(69_999..<70_002) == [0, 7, 7])
        try again.close()
    }

    @Test("Host offset 0 with COPIED is the first cluster, without it there is none")
    func firstCluster() throws {
        let (image, _, _) = try open([0: Self.copied])
        #expect(try image.bytes(0..<512).allSatisfy { $0 == 0xDD })
        #expect(try image.seekHole(from: 0) == 65536)
        try image.close()
        for entry in [UInt64(1), Self.copied | 1, 0] {
            let (image, _, _) = try open([0: entry])
            #expect(try image.bytes(0..<512).allSatisfy { $0 == 0 })
            try image.close()
        }
    }

    @Test("Zero clusters read as zeros whatever the data file holds, and take writes")
    func zeroClusters() throws {
        let (image, _, data) = try open([1: Self.copied | 65536 | 1, 2: 1])
        #expect(try image.bytes(0..<1.MiB).allSatisfy { $0 == 0 })
        for cluster in 1..<4 { try image.write([9], at: cluster * 65536 + 512) }
        try image.close()
        for cluster in 1..<4 {
            let bytes = data.bytes[cluster * 65536..<(cluster + 1) * 65536]
            #expect(bytes.filter { $0 == 9 }.count == 1 && bytes.filter { $0 == 0 }.count == 65535)
        }
        #expect(data.bytes[4 * 65536] == 0xDD)
    }

    @Test(
        "An entry that points elsewhere, or is compressed, gives EIO and stops writing",
        arguments: [
            1 << 63 | 131072, 1 << 63 | 131072 | 1, 1 << 62 | 0x50000, 1 << 63 | 66048,
        ] as [UInt64])
    func corrupt(entry: UInt64) throws {
        let (image, file, data) = try open([1: entry, 2: Self.copied | 131072])
        #expect(throws: ImageError.self) { try image.bytes(65536..<65537) }
        // A read harms nothing and nobody.
        #expect(try image.bytes(131072..<131073) == [0xDD])
        #expect(file.bytes.number(at: 72, as: UInt64.self) == 4)
        #expect(throws: ImageError.self) { try image.write([1], at: 65536) }
        #expect(throws: ImageError.self) { try image.write([1], at: 131072) }
        #expect(throws: ImageError.self) { try image.close() }
        #expect(file.bytes.number(at: 72, as: UInt64.self) == 6)
        #expect(data.bytes.allSatisfy { $0 == 0xDD })
    }

    @Test("An entry without COPIED is written in its place all the same, and gets it")
    func withoutCopied() throws {
        let (image, file, data) = try open([1: 65536])
        try image.write([1], at: 65536)
        try image.close()
        #expect(data.bytes[65536] == 1 && data.bytes[65537] == 0xDD)
        let reader = try file.bytes.withUnsafeBytes { bytes in
            try data.bytes.withUnsafeBytes { data in
                let reader = try ReferenceReader(bytes, dataFile: data)
                return try reader.rawEntry(forGuestCluster: 1, in: reader.active)
            }
        }
        #expect(reader == Self.copied | 65536)
    }

    @Test("A discard leaves a zero entry, and no place behind it")
    func discards() throws {
        let pair = try DataFilePair(raw: false)
        let image = try pair.open()
        try image.write([UInt8](repeating: 7, count: 4 * 65536), at: 0)
        try image.flush()
        try image.discard(0..<131072)
        try image.writeZeroes(131072..<196608, keepingSpace: true)
        #expect(try image.bytes(0..<196608).allSatisfy { $0 == 0 })
        #expect(try image.seekData(from: 0) == 196608)
        try image.close()
        #expect(
            try (0..<4).map(pair.entry) == [1, 1, Self.copied | 131072 | 1, Self.copied | 196608])
        // Space was given back; what is kept may hold anything.
        #expect(pair.data.bytes[..<131072].allSatisfy { $0 == 0 })
        #expect(pair.data.bytes[131072] == 7)
    }

    @Test("Trap 68: a raw data file reads as the disk does, whatever is zeroed or discarded")
    func rawStaysEqual() throws {
        for clusterSize in [512, 4096, 65536] as [UInt64] {
            let byteCount = 256.KiB + 1536
            let pair = try DataFilePair(byteCount, raw: true, clusterSize: clusterSize)
            let image = try pair.open()
            var random = RepeatableRandom(seed: TestEnvironment.seed)
            var model = [UInt8](repeating: 0, count: byteCount)
            for step in 0..<400 {
                let count = 1 + random.number(below: min(Int(clusterSize) * 3, byteCount / 2))
                let start =
                    random.chance(oneIn: 6)
                    ? byteCount - count : random.number(below: byteCount - count + 1)
                let range = UInt64(start)..<UInt64(start + count)
                var bytes = [UInt8](repeating: 0, count: count)
                switch random.number(below: 4) {
                case 0: try image.discard(range)
                case 1: try image.writeZeroes(range, keepingSpace: step % 2 == 0)
                case 2:
                    bytes = [UInt8](repeating: UInt8(1 + step % 255), count: count)
                    try image.write(bytes, at: start)
                default:
                    try image.allocate(range)
                    continue
                }
                model.put(bytes, at: start)
                if model != pair.data.bytes {
                    Issue.record("step \(step) of seed \(TestEnvironment.seed), \(clusterSize)")
                    break
                }
            }
            #expect(try image.bytes(0..<byteCount) == model)
            try image.close()
            #expect(try pair.bytes(0..<byteCount) == model)
        }
    }

    @Test(
        "Growing and shrinking take the data file along, and nothing old comes back",
        arguments: [false, true])
    func resizes(raw: Bool) throws {
        let pair = try DataFilePair(200_192, raw: raw)
        let image = try pair.open()
        try image.write([UInt8](repeating: 0xAA, count: 200_192), at: 0)
        try image.resize(to: 100_352, shrinking: true)
        #expect(pair.data.bytes.count == 100_352)
        try image.resize(to: 1 << 20)
        #expect(pair.data.bytes.count == 1 << 20)
        #expect(try image.bytes(0..<100_352).allSatisfy { $0 == 0xAA })
        #expect(try image.bytes(100_352..<1.MiB).allSatisfy { $0 == 0 })
        if raw { #expect(try image.bytes(0..<1.MiB) == pair.data.bytes) }
        try image.write([1], at: 1.MiB - 1)
        try image.close()
        #expect(pair.data.bytes.count == 1 << 20)
        // As QEMU has it: the tables of a raw data file know every cluster.
        #expect(try pair.entry(9) == (raw ? Self.copied | 9 * 65536 : 0))
    }

    @Test("Bytes that lie behind the disk in the data file do not show when it grows")
    func growsOverGarbage() throws {
        for raw in [false, true] {
            let pair = try DataFilePair(100_352, raw: raw)
            let garbage = [UInt8](repeating: 0xEE, count: 1.MiB)
            try garbage.withUnsafeBytes { try pair.data.write($0, at: 100_352) }
            let image = try pair.open()
            try image.write([1], at: 100_351)
            try image.resize(to: 300_032)
            #expect(try image.bytes(100_352..<300_032).allSatisfy { $0 == 0 })
            if raw { #expect(try image.bytes(0..<300_032) == pair.data.bytes) }
            try image.close()
            #expect(try pair.bytes(100_352..<300_032).allSatisfy { $0 == 0 })
        }
    }

    @Test("A data file that is too short reads as zeros behind its end, and grows when written")
    func tooShort() throws {
        let pair = try DataFilePair(raw: true)
        try pair.data.resize(to: 70_000)
        let image = try pair.open()
        #expect(try image.bytes(0..<1.MiB).allSatisfy { $0 == 0 })
        try image.write([1, 2, 3], at: 500_000)
        try image.close()
        #expect(Array(pair.data.bytes[499_999...]) == [0, 1, 2, 3])
    }

    @Test("An image whose data file is not given is refused by a typed error")
    func notGiven() throws {
        let pair = try DataFilePair(raw: false)
        do throws(ImageError) {
            _ = try Image.open(pair.image)
            Issue.record("it was opened")
        } catch {
            guard case .dataFile = error.kind else { throw error }
        }
    }

    @Test("Counts of an image that was not closed are rebuilt, and every data entry gets COPIED")
    func rebuilds() throws {
        let entries: [Int: UInt64] = [0: Self.copied, 1: 65536, 2: Self.copied | 131072 | 1]
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.incompatibleFeatures = 5
        for (cluster, entry) in entries { builder.setEntry(entry, guestCluster: cluster) }
        let file = RecordingDevice(builder.build(), yielding: false)
        let data = RecordingDevice([UInt8](repeating: 0xDD, count: 1.MiB), yielding: false)
        let image = try Image.open(file, dataFile: data)
        #expect(try image.bytes(0..<131072).allSatisfy { $0 == 0xDD })
        try image.close()
        let faults = try file.bytes.withUnsafeBytes { bytes in
            try data.bytes.withUnsafeBytes {
                let audit = try ReferenceReader(bytes, dataFile: $0).audit()
                return audit.faults + (audit.leakCount == 0 ? [] : ["leaks"])
            }
        }
        #expect(faults == [])
        #expect(file.bytes.number(at: 72, as: UInt64.self) == 4)
    }

    @Test("A check counts no cluster of the data file, and says what does not belong there")
    func checks() throws {
        let (_, file, _) = try open([
            0: Self.copied, 1: Self.copied | 65536, 2: 131072, 3: 1 << 62 | 0x50000, 4: 1,
        ])
        var findings: [CheckFinding] = []
        let check = try ImageCheck(file) { findings.append($0) }
        #expect(
            findings == [
                .compressedWithDataFile(entry: 1 << 62 | 0x50000),
                .clusterCopied(entry: 131072, stored: 1),
            ])
        #expect(check.corruptionCount == 2 && check.leakCount == 0)
        #expect(check.allocatedClusterCount == 3 && check.totalClusterCount == 16)
    }
}
