import Glibc
import QCOW2
import Synchronization
import TestSupport
import Testing

/// Readers and writers of the same bytes at the same time.
@Suite("Concurrency", .serialized)
struct ConcurrencyTests {
    @Test(
        "A reader never sees another offset's bytes, whatever is freed and reused beside it",
        arguments: [
            CrashLayout(clusterBits: 9, refcountOrder: 3, guestClusters: 192, hasCompressed: true),
            CrashLayout(clusterBits: 12, guestClusters: 96, hasBacking: true),
            CrashLayout(clusterBits: 16, guestClusters: 16, hasBacking: true, commitInterval: 1),
            CrashLayout(
                clusterBits: 14, guestClusters: 32, hasBacking: true, isExtended: true,
                commitInterval: 1),
        ])
    func readersSeeTheirOwn(_ layout: CrashLayout) throws {
        let (bytes, _) = layout.build()
        let device = RecordingDevice(bytes, seed: 3)
        let reads = Atomic(0)
        try takingTurns(seed: TestEnvironment.seed) {
            let image = try Image.open(device, backing: layout.backing())
            if let interval = layout.commitInterval {
                image.startCommitting(every: .milliseconds(interval))
            }
            let writersLeft = Atomic(2)
            try onThreads(4) { index in
                var random = RepeatableRandom(seed: UInt64(index) + 17)
                if index < 2 {
                    defer { writersLeft.subtract(1, ordering: .releasing) }
                    for step in 0..<300 { try Self.write(image, layout, &random, step) }
                } else {
                    while writersLeft.load(ordering: .acquiring) > 0 {
                        passTurn()
                        try Self.read(image, layout, &random)
                        reads.add(1, ordering: .relaxed)
                    }
                }
            }
            try image.close()
        }
        #expect(reads.load(ordering: .relaxed) > 100)
        let audit = try device.bytes.withUnsafeBytes { try ReferenceReader($0).audit() }
        #expect(audit.faults == [] && audit.leakCount == 0)
    }

    /// Writes, discards and flushes, so that freed clusters are taken again at once.
    private static func write(
        _ image: Image, _ layout: CrashLayout, _ random: inout RepeatableRandom, _ step: Int
    ) throws {
        let count = 1 + random.number(below: layout.sectorsPerCluster * 2)
        let start = random.number(below: layout.sectorCount - count + 1)
        switch random.number(below: 6) {
        case 0..<3:
            try image.write(
                SectorPattern.bytes(sectors: start..<start + count, value: UInt64(step) + 1000),
                at: start * 512)
        case 3..<5:
            let first = start / layout.sectorsPerCluster << layout.clusterBits
            try image.discard(UInt64(first)..<UInt64(first + 1 << layout.clusterBits))
        default: try image.flush()
        }
    }

    private static func read(
        _ image: Image, _ layout: CrashLayout, _ random: inout RepeatableRandom
    ) throws {
        let count = 1 + random.number(below: min(64, layout.sectorCount))
        let start = random.number(below: layout.sectorCount - count + 1)
        let bytes = try image.bytes(start * 512..<(start + count) * 512)
        try bytes.withUnsafeBytes { buffer in
            for sector in start..<start + count {
                let part = buffer[(sector - start) * 512..<(sector - start + 1) * 512]
                try #require(
                    SectorPattern.value(of: UnsafeRawBufferPointer(rebasing: part), sector: sector)
                        != nil, "sector \(sector) holds foreign or torn bytes")
            }
        }
    }

    @Test("Trap 58, subclusters: the writers of one cluster all keep their bytes")
    func sharedSubclusters() throws {
        for round in 0..<10 {
            let size = 64.KiB
            let builder = ImageBuilder(byteCount: 4 * size, isExtended: true)
            let device = RecordingDevice(builder.build(), seed: UInt64(round))
            let image = try Image.open(device)
            try onThreads(4) { index in
                // Half of the writes begin or end inside a subcluster that a neighbour writes to.
                for position in stride(from: index * 1024, to: 4 * size, by: 4096) {
                    try image.write([UInt8](repeating: UInt8(index + 1), count: 1024), at: position)
                }
            }
            try image.close()
            try device.bytes.withUnsafeBytes { bytes in
                let reader = try ReferenceReader(bytes)
                let disk = try reader.read(0..<4 * size)
                let isRight = disk.indices.allSatisfy { disk[$0] == UInt8($0 / 1024 % 4 + 1) }
                #expect(isRight, "round \(round)")
                let audit = reader.audit()
                #expect(audit.faults == [] && audit.leakCount == 0)
            }
        }
    }

    @Test("A look-up sees both words of an extended entry old, or both new")
    func entriesAreWhole() throws {
        let cache = try SharedCache()
        let isDone = Atomic(false)
        let seen = Atomic(0)
        try onThreads(3) { index in
            if index == 0 {
                defer { isDone.store(true, ordering: .releasing) }
                for step in 0..<200_000 as Range<UInt64> { cache.store(step) }
                return
            }
            while !isDone.load(ordering: .acquiring) {
                guard let (first, second) = cache.look() else { continue }
                try #require(first == ~second, "torn: \(hex(first)), \(hex(second))")
                seen.add(1, ordering: .relaxed)
            }
        }
        #expect(seen.load(ordering: .relaxed) > 0)
    }

    @Test("Trap 58: two writers of one unallocated cluster both keep their bytes")
    func sharedCluster() throws {
        for seed in 0..<30 as Range<UInt64> {
            let builder = ImageBuilder(byteCount: 1.MiB)
            let device = RecordingDevice(builder.build(), seed: seed)
            let image = try Image.open(device)
            try onThreads(4) { index in
                for part in stride(from: index, to: 128, by: 4) {
                    try image.write(
                        SectorPattern.bytes(sectors: part..<part + 1, value: UInt64(index) + 1),
                        at: part * 512)
                }
            }
            let bytes = try image.bytes(0..<64.KiB)
            for sector in 0..<128 {
                let value = bytes[sector * 512..<(sector + 1) * 512].withUnsafeBytes {
                    SectorPattern.value(of: $0, sector: sector)
                }
                #expect(value == UInt64(sector % 4) + 1, "seed \(seed), sector \(sector)")
            }
            try image.close()
        }
    }

    @Test("Flushes that come together share commits")
    func groupCommit() throws {
        let builder = ImageBuilder(byteCount: 8.MiB)
        let device = RecordingDevice(builder.build(), seed: 1)
        let image = try Image.open(device)
        let before = device.syncCount
        try onThreads(8) { index in
            for step in 0..<12 {
                try image.write([UInt8](repeating: 1, count: 4096), at: (index * 12 + step) * 65536)
                try image.flush()
            }
        }
        let syncs = device.syncCount - before
        try image.close()
        // Alone, each of the 96 flushes would take two syncs.
        #expect(syncs < 192, "\(syncs) syncs for 96 flushes")
        print("• 96 flushes of 8 threads took \(syncs) syncs")
    }
}

/// A cache with one slice of extended entries, which one thread changes.
private final class SharedCache: Sendable {
    private let cache: SliceCache
    private let slot: Int

    init() throws {
        cache = try SliceCache(wordBits: 9, entryWordBits: 1, byteCount: 4096)
        slot = cache.victim(for: 5) { _ in true } ?? 0
        let bytes = [UInt8](repeating: 0, count: 4096)
        bytes.withUnsafeBytes { cache.fill(slot, with: 5, from: $0) }
        store(0)
    }

    func store(_ number: UInt64) {
        cache.store(
            L2Entry(bits: number, subclusters: SubclusterBitmap(bits: ~number)), in: slot, at: 7)
    }

    /// Both words of the entry; nil while it is being changed.
    func look() -> (UInt64, UInt64)? {
        guard let (slot, version) = cache.find(5) else { return nil }
        let words = cache.words(of: slot)
        let pair = (
            words[14].load(ordering: .relaxed), words[15].load(ordering: .relaxed)
        )
        return cache.isUnchanged(slot, version) ? pair : nil
    }
}
