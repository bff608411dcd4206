import QCOW2
import TestSupport
import Testing

/// Whatever moment the power goes, a bitmap that is valid marks everything that changed.
@Suite("Bitmaps and crashes")
struct BitmapCrashTests {
    /// Where the extension's data lies in the header's cluster.
    enum Place: CaseIterable { case firstSector, secondSector, acrossSectors }

    private static let granularity = 4096

    /// A disk of known sectors with a bitmap that marks some of it already.
    private func build(_ place: Place) -> [UInt8] {
        var builder = ImageBuilder(byteCount: 64 * 4096, clusterBits: 12)
        for cluster in stride(from: 0, to: 64, by: 3) {
            builder.write(pattern(cluster * 8..<cluster * 8 + 8, 1), guestCluster: cluster)
        }
        // A record fills the header up to the wanted place; 112 bytes come before it.
        switch place {
        case .firstSector: break
        case .secondSector: builder.extensions = [(0x1234_5678, .init(repeating: 7, count: 384))]
        case .acrossSectors: builder.extensions = [(0x1234_5678, .init(repeating: 7, count: 376))]
        }
        builder.bitmap("backup", granularityBits: 12, bits: [0x0f])
        builder.bitmap("fine", granularityBits: 9)
        return builder.build()
    }

    private func pattern(_ sectors: Range<Int>, _ value: UInt64) -> [UInt8] {
        SectorPattern.bytes(sectors: sectors, value: value)
    }

    @Test(
        "Trap 64: a power cut leaves a bitmap in use, gone, or right",
        arguments: Place.allCases)
    func cuts(_ place: Place) throws {
        let bytes = build(place)
        let record = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(record)
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        for step in 0..<24 {
            let start = random.number(below: 500)
            let sectors = start..<start + 1 + random.number(below: 12)
            switch step % 6 {
            case 4: try image.discard(UInt64(start * 512)..<UInt64(sectors.upperBound * 512))
            case 5: try image.flush()
            default: try image.write(pattern(sectors, UInt64(step + 10)), at: start * 512)
            }
        }
        try image.close()
        let states = try judge(record, original: bytes)
        print("• \(states) crash states judged with bitmaps, \(place)")
    }

    /// Judges every state that a cut could have left, and the last one.
    private func judge(_ record: RecordingDevice, original: [UInt8]) throws -> Int {
        let before = try original.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            return try reader.read(0..<reader.byteCount)
        }
        var explorer = CrashExplorer(initial: record.initial, seed: TestEnvironment.seed)
        var sawValid = 0
        for moment in record.moments {
            if case .flushed = moment {
                let fault = explorer.explore { self.fault(in: $0, before, &sawValid) }
                if let fault {
                    Issue.record("seed \(TestEnvironment.seed): \(fault)")
                    return explorer.stateCount
                }
            }
            explorer.advance(moment)
        }
        let end = record.bytes.withUnsafeBytes { fault(in: $0, before, &sawValid) }
        #expect(end == nil)
        #expect(sawValid > 0)
        try record.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            #expect(reader.audit().leakCount == 0)
            #expect(try reader.bitmaps().map(\.flags) == [2, 2])
        }
        return explorer.stateCount
    }

    private func fault(
        in state: UnsafeRawBufferPointer, _ before: [UInt8], _ sawValid: inout Int
    ) -> String? {
        do {
            let reader = try ReferenceReader(state)
            if let fault = reader.audit().faults.first { return fault }
            let now = try reader.read(0..<reader.byteCount)
            for bitmap in try reader.bitmaps() where !bitmap.isInUse {
                sawValid += 1
                let marked = Set(bitmap.marked)
                for sector in 0..<now.count / 512 {
                    let range = sector * 512..<(sector + 1) * 512
                    if now[range] == before[range] { continue }
                    guard marked.contains(sector * 512 / bitmap.granularity) else {
                        return "'\(bitmap.name)' is valid and misses sector \(sector)"
                    }
                }
                if bitmap.name == "backup", !Set(0..<4).isSubset(of: marked) {
                    return "old marks are gone"
                }
            }
            return nil
        } catch { return "\(error)" }
    }

    @Test(
        "A power cut while a bitmap is added or removed leaves the old ones, the new ones, or none",
        arguments: Place.allCases)
    func changes(_ place: Place) throws {
        var bytes = build(place)
        let steps: [(String, [BitmapChange], after: [String])] = [
            ("third", [.add(granularity: 4096)], ["backup", "fine", "third"]),
            ("backup", [.remove], ["fine", "third"]),
            ("fine", [.merge(source: "third", path: nil), .disable], ["fine", "third"]),
            ("third", [.remove], ["fine"]),
            ("fine", [.remove], []),
            ("again", [.add(granularity: nil)], ["again"]),
        ]
        var before = ["backup", "fine"]
        for (name, changes, after) in steps {
            let record = RecordingDevice(bytes, yielding: false)
            let image = try Image.open(record)
            try image.changeBitmap(Array(name.utf8), changes)
            try image.close()
            var explorer = CrashExplorer(initial: record.initial, seed: TestEnvironment.seed)
            for moment in record.moments {
                if case .flushed = moment {
                    let fault = explorer.explore { Self.fault(in: $0, [before, after, []]) }
                    #expect(fault == nil, "\(name), seed \(TestEnvironment.seed)")
                }
                explorer.advance(moment)
            }
            bytes = record.bytes
            let end = bytes.withUnsafeBytes { Self.fault(in: $0, [after]) }
            #expect(end == nil, "\(name)")
            before = after
        }
    }

    private static func fault(in state: UnsafeRawBufferPointer, _ allowed: [[String]]) -> String? {
        do {
            let reader = try ReferenceReader(state)
            if let fault = reader.audit().faults.first { return fault }
            let names = try reader.bitmaps().map(\.name)
            return allowed.contains(names) ? nil : "the bitmaps are \(names)"
        } catch { return "\(error)" }
    }
}
