import QCOW2
import TestSupport
import Testing

/// Compaction between random changes, in memory, with the map and the content judged each time.
@Suite("Compaction at random")
struct CompactRandomTests {
    static let kinds: [CreateOptions] = [9, 12, 16].flatMap { bits in
        [UInt64(1), 16, 64].map { width in
            var options = CreateOptions()
            options.clusterByteCount = 1 << UInt64(bits)
            options.refcountBits = width
            return options
        }
    }

    /// Clusters of the file as short as it can be, but for tables without room in one piece.
    private func expectShort(
        _ device: RAMDisk, _ words: String, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let image = try Image.open(device, options: .readOnly)
        let usage = try image.spaceUsage()
        #expect(usage.freeClusterCount <= 4, "\(words)", sourceLocation: sourceLocation)
        try image.close()
    }

    private func dataClusters(_ image: Image) throws -> Set<Int> {
        var found: Set<Int> = []
        try image.forEachMappedExtent(in: 0..<image.size) { extent in
            guard extent.isData else { return }
            let first = Int(extent.start / image.clusterByteCount)
            let count = Int(extent.byteCount / image.clusterByteCount)
            found.formUnion(first..<first + count)
        }
        return found
    }

    @Test(
        "Each round of writes and discards is compacted, and all is where it was", arguments: kinds)
    func rounds(_ options: CreateOptions) throws {
        let cluster = Int(options.clusterByteCount)
        let seed = TestEnvironment.seed
        var random = RepeatableRandom(seed: seed)
        var model: [Int: UInt8] = [:]
        let device = RAMDisk()
        try Image.create(on: device, size: UInt64(128 * cluster), options: options)
        for round in 0..<(TestEnvironment.isLong ? 1024 : 60) {
            let words = "seed \(seed), round \(round)"
            let image = try Image.open(device)
            for _ in 0..<1 + random.number(below: 6) {
                let first = random.number(below: 128)
                let count = min(1 + random.number(below: 24), 128 - first)
                if random.chance(oneIn: 2) {
                    let byte = UInt8(1 + random.number(below: 255))
                    try image.write(
                        [UInt8](repeating: byte, count: count * cluster), at: first * cluster)
                    for index in first..<first + count { model[index] = byte }
                } else {
                    try image.discard(
                        UInt64(first * cluster)..<UInt64((first + count) * cluster))
                    for index in first..<first + count { model[index] = nil }
                }
            }
            try image.close()
            try Image.compact(on: device)
            let check = try ImageCheck(device)
            try #require(check.corruptionCount == 0 && check.leakCount == 0, "\(words): \(check)")
            try expectShort(device, words)
            let again = try Image.open(device, options: .readOnly)
            try #require(try dataClusters(again) == Set(model.keys), "\(words)")
            for index in 0..<128 {
                let bytes = try again.bytes(index * cluster..<(index + 1) * cluster)
                let byte = model[index] ?? 0
                try #require(bytes.allSatisfy { $0 == byte }, "\(words), cluster \(index)")
            }
            try again.close()
        }
    }

    @Test("A disk that was discarded whole is an empty image", arguments: [0, 1, 2, 16384])
    func everything(count: Int) throws {
        let device = RAMDisk()
        var options = CreateOptions()
        options.clusterByteCount = 512
        try Image.create(on: device, size: 16384 * 512, options: options)
        let empty = try device.byteCount()
        let image = try Image.open(device)
        if count > 0 { try image.write([UInt8](repeating: 1, count: count * 512), at: 0) }
        try image.discard(0..<image.size)
        try image.close()
        try Image.compact(on: device)
        let check = try ImageCheck(device)
        #expect(check.corruptionCount == 0 && check.leakCount == 0)
        // A refcount table that has grown stays as long.
        #expect(try device.byteCount() <= empty + 16 * 512)
        let again = try Image.open(device, options: .readOnly)
        #expect(try again.seekData(from: 0) == nil)
        try again.close()
    }

    @Test("What was written high moves low, and can be written again")
    func lowAndHigh() throws {
        let device = RAMDisk()
        try Image.create(on: device, size: 64 << 20)
        let image = try Image.open(device)
        try image.write([UInt8](repeating: 1, count: 4 << 20), at: 0)
        try image.write([UInt8](repeating: 2, count: 1 << 20), at: 60 << 20)
        try image.discard(0..<4 << 20)
        try image.close()
        let old = try device.byteCount()
        let done = try Image.compact(on: device)
        #expect(try device.byteCount() <= old - 4 << 20 && done.movedClusterCount == 16)
        let again = try Image.open(device)
        #expect(try again.bytes(60 << 20..<61 << 20).allSatisfy { $0 == 2 })
        #expect(try again.bytes(0..<4 << 20).allSatisfy { $0 == 0 })
        try again.write([3], at: 60 << 20)
        #expect(try again.bytes(60 << 20..<60 << 20 + 2) == [3, 2])
        try again.close()
        #expect(try ImageCheck(device).corruptionCount == 0)
    }
}
