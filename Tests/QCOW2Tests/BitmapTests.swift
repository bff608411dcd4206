import QCOW2
import TestSupport
import Testing

/// Persistent dirty bitmaps through a session, judged by the tests' own reader.
@Suite("Bitmaps")
struct BitmapTests {
    /// Opens the image, lets `body` use it, closes it, and hands the result to `judge`.
    private func use(
        _ bytes: [UInt8], _ body: (Image, RecordingDevice) throws -> Void,
        judge: (ReferenceReader) throws -> Void
    ) throws {
        let device = RecordingDevice(bytes, yielding: false)
        try changeImage(on: device, { try body($0, device) }, judge: judge)
    }

    private func bitmaps(of device: RecordingDevice) throws -> [ReferenceReader.Bitmap] {
        try device.bytes.withUnsafeBytes { try ReferenceReader($0).bitmaps() }
    }

    @Test("Trap 65: every valid bitmap is in use on disk before the first write")
    func inUseBeforeTheFirstWrite() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.bitmap("records")
        builder.bitmap("rests", flags: 0, bits: [1])
        try use(builder.build()) { image, device in
            #expect(try bitmaps(of: device).map(\.flags) == [2, 0])
            try image.write([1], at: 70_000)
            #expect(try bitmaps(of: device).map(\.flags) == [3, 1])
            // The marks were durable before the data was written at all.
            let synced = device.moments.firstIndex { if case .flushed = $0 { true } else { false } }
            let written = device.moments.firstIndex {
                if case .write(_, _, let bytes) = $0 { bytes.count == 1 } else { false }
            }
            #expect(synced.map { $0 < written ?? 0 } == true)
        } judge: { (reader) throws in
            let bitmaps = try reader.bitmaps()
            #expect(bitmaps.map(\.flags) == [2, 0])
            #expect(bitmaps.map(\.marked) == [[1], [0]])
        }
    }

    @Test("A session that changes nothing leaves every byte as it was")
    func nothing() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.bitmap("records", bits: [5])
        let bytes = builder.build()
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        _ = try image.bytes(0..<1000)
        try image.flush()
        try image.close()
        #expect(device.bytes == bytes)
    }

    @Test("Writes, zeroes and discards are recorded in the enabled bitmaps, whatever their grain")
    func records() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 12)
        builder.bitmap("fine", granularityBits: 9, bits: [0, 0b100])
        builder.bitmap("coarse", granularityBits: 16)
        builder.bitmap("off", granularityBits: 16, flags: 0)
        try use(builder.build()) { image, _ in
            try image.write([UInt8](repeating: 1, count: 513), at: 512)
            try image.discard(131_072..<131_073)
            try image.writeZeroes(UInt64(1.MiB - 1)..<UInt64(1.MiB))
            try image.allocate(300_000..<400_000)
        } judge: { (reader) throws in
            let bitmaps = try reader.bitmaps()
            #expect(bitmaps[0].marked == [1, 2, 10, 256, 2047])
            #expect(bitmaps[1].marked == [0, 2, 15])
            #expect(bitmaps[2].marked == [])
        }
    }

    @Test("Trap 66: growing and shrinking gives bitmaps the right size, and new bytes count")
    func resizes() throws {
        // A cluster holds the bits of 2 MiB.
        var builder = ImageBuilder(byteCount: 3.MiB, clusterBits: 9)
        builder.bitmap("records", granularityBits: 9, bits: [UInt8](repeating: 0xff, count: 768))
        builder.bitmap(
            "rests", granularityBits: 9, flags: 0, bits: [UInt8](repeating: 0xff, count: 768))
        try use(builder.build()) { image, _ in
            try image.resize(to: UInt64(1.MiB), shrinking: true)
            try image.resize(to: UInt64(5.MiB))
            try image.resize(to: UInt64(4.MiB + 512), shrinking: true)
        } judge: { (reader) throws in
            let bitmaps = try reader.bitmaps()
            #expect(bitmaps[0].marked == Array(0..<8193))
            #expect(bitmaps[1].marked == Array(0..<2048))
        }
    }

    @Test(
        "Going back to a snapshot marks the whole disk in the enabled bitmaps, at its size then",
        arguments: [1.MiB, 2.MiB, 3.MiB - 512])
    func marksApplication(byteCount: Int) throws {
        var builder = ImageBuilder(byteCount: 2.MiB, clusterBits: 12)
        builder.bitmap("fine", granularityBits: 9, bits: [1])
        builder.bitmap("coarse", granularityBits: 20)
        builder.bitmap("off", flags: 0, bits: [0xff, 0xff, 0xff, 0xff])
        try use(builder.build()) { image, _ in
            try image.resize(to: UInt64(byteCount), shrinking: true)
            try image.createSnapshot("kept")
            try image.resize(to: UInt64(2.MiB), shrinking: true)
            try image.applySnapshot("kept")
        } judge: { (reader) throws in
            let bitmaps = try reader.bitmaps()
            #expect(reader.byteCount == byteCount)
            #expect(bitmaps.map(\.flags) == [2, 2, 0])
            #expect(bitmaps[0].marked == Array(0..<byteCount / 512))
            #expect(bitmaps[1].marked == Array(0..<(byteCount + 1.MiB - 1) / 1.MiB))
            #expect(bitmaps[2].marked == Array(0..<min(byteCount, 2.MiB) / 65536))
        }
    }

    @Test("Making and deleting snapshots marks nothing")
    func marksNoSnapshots() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        for cluster in 0..<16 { builder.fill(1, guestCluster: cluster) }
        builder.bitmap("records", bits: [0b1000])
        try use(builder.build()) { image, _ in
            try image.createSnapshot("a")
            try image.createSnapshot("b")
            try image.deleteSnapshot("a")
        } judge: { (reader) throws in
            #expect(try reader.bitmaps().map(\.marked) == [[3]])
        }
    }

    @Test("A snapshot of another size is not applied where a bitmap could not follow")
    func refusesApplication() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.bitmap("lost")
        var bytes: [UInt8] = []
        try use(builder.build()) { image, _ in
            try image.createSnapshot("smaller")
            try image.resize(to: UInt64(2.MiB))
            try image.createSnapshot("same")
        } judge: { (reader) throws in
            bytes = Array(reader.bytes)
            let place = try #require(try reader.bitmapsExtension()).number(at: 16, as: UInt64.self)
            bytes.put(UInt32(3), at: Int(place) + 12)
        }
        try use(bytes) { image, _ in
            try image.applySnapshot("same")
            #expect {
                try image.applySnapshot("smaller")
            } throws: {
                "\($0)".contains("'lost'") && "\($0)".contains("--remove")
            }
        } judge: { (reader) throws in
            #expect(reader.byteCount == 2.MiB)
            #expect(try reader.bitmaps().map(\.flags) == [3])
        }
    }

    @Test("A disk with an inconsistent bitmap keeps its size")
    func refusesResize() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.bitmap("lost", flags: 3)
        try use(builder.build()) { image, _ in
            #expect {
                try image.resize(to: UInt64(2.MiB))
            } throws: {
                "\($0)".contains("'lost'") && "\($0)".contains("--remove")
            }
        } judge: { (reader) throws in
            #expect(reader.byteCount == 1.MiB)
            #expect(try reader.bitmaps()[0].flags == 3)
        }
    }

    @Test("Bitmaps of unknown types, with unknown flags or extra data are kept as they are")
    func keepsForeign() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.bitmap("type", flags: 0, type: 2, bits: [1])
        builder.bitmap("flag", flags: 1 << 9, bits: [2])
        builder.bitmap("extra", flags: 0, bits: [4], extra: [1, 2, 3])
        builder.bitmap("usable", flags: 0b110, bits: [8], extra: [4, 5, 6, 7, 8])
        builder.bitmap("recording", flags: 2, type: 2, bits: [16])
        try use(builder.build()) { image, _ in
            try image.write([1], at: 0)
        } judge: { (reader) throws in
            let bitmaps = try reader.bitmaps()
            // Whoever understands the last one must not believe it: a write was missed.
            #expect(bitmaps.map(\.flags) == [0, 1 << 9, 0, 0b110, 3])
            #expect(bitmaps.map(\.type) == [2, 1, 1, 1, 2])
            #expect(bitmaps.map(\.extra) == [[], [], [1, 2, 3], [4, 5, 6, 7, 8], []])
            #expect(bitmaps.map(\.marked) == [[0], [1], [2], [0, 3], [4]])
        }
    }

    @Test("A bitmap whose table is too short or makes no sense becomes inconsistent")
    func damaged() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.bitmap("short")
        builder.bitmap("wild", bits: [1])
        var bytes = builder.build()
        let reader = try bytes.withUnsafeBytes { try ReferenceReader($0).bitmapsExtension() }
        let directory = Int(try #require(reader).number(at: 16, as: UInt64.self))
        bytes.put(UInt32(0), at: directory + 8)
        let table = Int(bytes.number(at: directory + 32, as: UInt64.self))
        bytes.put(bytes.number(at: table, as: UInt64.self) | 2, at: table)
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        try image.write([1], at: 0)
        try image.close()
        let bitmaps = try bitmaps(of: device)
        #expect(bitmaps.count == 2 && bitmaps.allSatisfy { $0.isInUse })
    }

    @Test("Random changes are marked exactly, over many clusters of bits", arguments: [9, 12])
    func random(clusterBits: Int) throws {
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        // 512-byte clusters hold the bits of 2 MiB at the finest grain.
        let size = 9.MiB + 1536
        var builder = ImageBuilder(byteCount: size, clusterBits: clusterBits)
        builder.bitmap("fine", granularityBits: 9)
        builder.bitmap("coarse", granularityBits: 14)
        var bytes = builder.build()
        var expected: [Set<Int>] = [[], []]
        for round in 0..<4 {
            let device = RecordingDevice(bytes, yielding: false)
            let image = try Image.open(device)
            for _ in 0..<30 {
                let count = 1 + random.number(below: random.chance(oneIn: 6) ? 3.MiB : 5000)
                let start = random.number(below: size - count)
                let range = UInt64(start)..<UInt64(start + count)
                if random.chance(oneIn: 3) {
                    try image.discard(range)
                } else if count < 10_000 {
                    try image.write([UInt8](repeating: 7, count: count), at: start)
                } else {
                    try image.writeZeroes(range, keepingSpace: true)
                }
                for (index, bits) in [9, 14].enumerated() {
                    expected[index].formUnion(start >> bits...(start + count - 1) >> bits)
                }
            }
            try image.close()
            bytes = device.bytes
            try bytes.withUnsafeBytes { bytes in
                let reader = try ReferenceReader(bytes)
                let audit = reader.audit()
                #expect(audit.faults == [] && audit.leakCount == 0, "round \(round)")
                let found = try reader.bitmaps().map { Set($0.marked) }
                #expect(found == expected, "round \(round), seed \(TestEnvironment.seed)")
            }
        }
    }

    @Test("What a bitmap marks is listed as ranges, whole parts of ones among them")
    func lists() throws {
        var builder = ImageBuilder(byteCount: 8.MiB, clusterBits: 9)
        // Part 0 has a few bits, part 1 is to be all ones, part 3 ends with the disk.
        var bits = [UInt8](repeating: 0, count: 4 * 512)
        bits[0] = 0b0110_1001
        bits[511] = 0x80
        for index in 512..<1024 { bits[index] = 0xff }
        bits[1024] = 1
        bits[2047] = 0xc0
        builder.bitmap("b", granularityBits: 9, bits: bits)
        let image = try Image.open(bytes: builder.build(), options: .readOnly)
        var ranges: [Range<UInt64>] = []
        try image.forEachRange(markedBy: "b") { ranges.append($0) }
        let expected = [0..<1, 3..<4, 5..<7, 4095..<8193, 16382..<16384]
        #expect(
            ranges == expected.map { UInt64($0.lowerBound * 512)..<UInt64($0.upperBound * 512) })
        #expect(throws: ImageError.self) { try image.forEachRange(markedBy: "c") { _ in } }
        try image.close()
    }
}
