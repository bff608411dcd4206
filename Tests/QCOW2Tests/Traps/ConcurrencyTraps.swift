import QCOW2
import TestSupport
import Testing

/// Trap 59: what one queue flushes when another one writes.
@Suite("Traps of queues that share an image", .serialized)
struct ConcurrencyTraps {
    @Test(
        "Trap 59: a flush of one queue covers what had returned to all the others",
        arguments: [
            CrashLayout(clusterBits: 9, guestClusters: 128, hasBacking: true),
            CrashLayout(clusterBits: 12, guestClusters: 32, hasCompressed: true),
            CrashLayout(clusterBits: 16, guestClusters: 8, commitInterval: 1),
        ])
    func flushesOfQueues(_ layout: CrashLayout) throws {
        let seed = TestEnvironment.seed
        let workload = CrashWorkload(layout: layout, seed: seed, threadCount: 6, stepCount: 20)
        let (record, model) = try workload.run()
        let verdict = CrashJudge.judge(
            record, layout, model: model, seed: seed,
            effort: CrashExplorer.Effort(prefixes: 4, singles: 1, subsets: 4))
        #expect(verdict.fault == nil, "seed \(seed), \(verdict.stateCount) states")
    }

    @Test(
        "Trap 72: the smallest caches give the same bytes as large ones",
        arguments: [
            CrashLayout(clusterBits: 9, guestClusters: 4096, hasCompressed: true),
            CrashLayout(
                clusterBits: 12, refcountOrder: 6, guestClusters: 1024, hasBacking: true,
                hasCompressed: true),
        ], 0..<3 as Range<UInt64>)
    func smallCaches(_ layout: CrashLayout, run: UInt64) throws {
        let seed = TestEnvironment.seed &+ run
        var random = RepeatableRandom(seed: seed)
        let (bytes, values) = layout.build()
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(
            device, backing: layout.backing(),
            options: OpenOptions(cacheByteCount: 0, decompressedCacheByteCount: 0))
        var model = values
        func check(_ sectors: Range<Int>) throws {
            let found = try image.bytes(sectors.lowerBound * 512..<sectors.upperBound * 512)
            for sector in sectors {
                let start = (sector - sectors.lowerBound) * 512
                let value = found[start..<start + 512].withUnsafeBytes {
                    SectorPattern.value(of: $0, sector: sector)
                }
                try #require(value == model[sector], "seed \(seed), sector \(sector)")
            }
        }
        for step in 0..<600 {
            let start = random.number(below: layout.sectorCount - 64)
            let sectors = start..<start + 1 + random.number(below: step % 4 == 0 ? 64 : 4)
            let range = UInt64(start * 512)..<UInt64(sectors.upperBound * 512)
            let value = UInt64(step) + 1000
            switch random.number(below: 8) {
            case 0..<3:
                try image.write(
                    SectorPattern.bytes(sectors: sectors, value: value), at: start * 512)
                for sector in sectors { model[sector] = value }
            case 3:
                try image.discard(range)
                for sector in sectors { model[sector] = 0 }
            case 4: if random.chance(oneIn: 4) { try image.flush() }
            default: try check(sectors)
            }
        }
        for start in stride(from: 0, to: layout.sectorCount, by: 64) {
            try check(start..<min(start + 64, layout.sectorCount))
        }
        try image.close()
        try expectSound(device, "seed \(seed)")
    }
}
