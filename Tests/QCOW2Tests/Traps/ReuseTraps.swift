import Glibc
import QCOW2
import Synchronization
import TestSupport
import Testing

/// Traps 41 to 49: clusters that are freed and taken again.
@Suite("Traps of freed clusters", .serialized)
struct ReuseTraps {
    @Test(
        "Trap 41: a freed cluster is not reused before the disk knows that it is free",
        arguments: [
            CrashLayout(clusterBits: 9, guestClusters: 64, hasSnapshot: false),
            CrashLayout(clusterBits: 12, guestClusters: 40, hasSnapshot: false, hasBacking: true),
            CrashLayout(
                clusterBits: 12, guestClusters: 40, hasSnapshot: false, hasCompressed: true),
        ])
    func reuseAfterDiscard(_ layout: CrashLayout) throws {
        let (record, model) = try layout.record()
        let image = try Image.open(record, backing: layout.backing())
        let client = NotedClient(image, record, layout)
        for round in 0..<8 {
            // Stored clusters go and others come, in one session and without a flush.
            for offset in 0..<4 {
                try client.discard((round * 5 + offset * 8) % layout.guestClusters)
                try client.write((round * 8 + 1 + offset * 3) % layout.guestClusters)
            }
            try client.flush()
        }
        try image.close()
        let verdict = CrashJudge.judge(record, layout, model: model, seed: TestEnvironment.seed)
        #expect(verdict.fault == nil, "seed \(TestEnvironment.seed)")
        #expect(verdict.stateCount > 300)
    }

    @Test("Trap 42: a hole is punched before its cluster has a new owner, however long it takes")
    func slowPunches() throws {
        let builder = ImageBuilder(byteCount: 4.MiB, clusterBits: 12)
        let disk = RAMDisk()
        try builder.build().withUnsafeBytes { try disk.write($0, at: 0) }
        let device = SlowPunchDevice(disk)
        let image = try Image.open(device)
        try onThreads(4) { index in
            var random = RepeatableRandom(seed: TestEnvironment.seed &+ UInt64(index))
            let first = index * 256
            var model = [UInt64](repeating: 0, count: 256)
            for step in 1...150 {
                let start = random.number(below: 248)
                let clusters = start..<start + 1 + random.number(below: 8)
                let offset = UInt64(first + clusters.lowerBound) << 12
                if step % 3 == 0 {
                    try image.discard(offset..<offset + UInt64(clusters.count) << 12)
                } else {
                    let bytes = [UInt8](repeating: UInt8(step), count: clusters.count << 12)
                    try image.write(bytes, at: Int(offset))
                }
                for cluster in clusters { model[cluster] = step % 3 == 0 ? 0 : UInt64(step) }
                if step % 5 == 0 { try image.flush() }
                let probe = random.number(below: 256)
                let place = (first + probe) << 12
                guard try reads(image, place..<place + 4096, UInt8(model[probe])) else {
                    throw ReferenceReader.Fault("thread \(index), step \(step), cluster \(probe)")
                }
            }
            for (cluster, value) in model.enumerated() {
                let place = (first + cluster) << 12
                guard try reads(image, place..<place + 4096, UInt8(value)) else {
                    throw ReferenceReader.Fault("thread \(index), cluster \(cluster) at the end")
                }
            }
        }
        try image.close()
        #expect(device.punchCount > 20)
        let check = try ImageCheck(disk)
        #expect(check.corruptionCount == 0 && check.leakCount == 0)
    }

    @Test("Trap 43: ten thousand flushes leave the file as small as one")
    func staysSmall() throws {
        let builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
        let disk = RAMDisk()
        try builder.build().withUnsafeBytes { try disk.write($0, at: 0) }
        let image = try Image.open(disk)
        for round in 0..<5000 {
            try image.write([UInt8](repeating: UInt8(round & 0x7F + 1), count: 4096), at: 8192)
            try image.flush()
            try image.discard(8192..<12288)
            try image.flush()
        }
        try image.close()
        #expect(try disk.byteCount() < 128 << 10)
    }

    @Test("Trap 43: tables that are freed are used again")
    func reusesTables() throws {
        // Each round makes and drops L2 tables, and an L1 table of its own.
        let builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 9)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        var sizes: [Int] = []
        for round in 0..<40 {
            try image.resize(to: UInt64((8 + round % 2 * 8).MiB))
            for table in 2..<40 { try image.write([1], at: table * 32.KiB) }
            try image.flush()
            try image.resize(to: UInt64(64.KiB), shrinking: true)
            sizes.append(device.bytes.count)
        }
        try image.close()
        #expect(sizes.dropFirst(4).max()! <= sizes[..<4].max()!, "\(sizes)")
        try expectSound(device)
    }

    @Test(
        "Trap 49: a freed table's cached entries are never written over the cluster's new owner",
        arguments: 0..<6 as Range<UInt64>)
    func staleTables(run: UInt64) throws {
        let seed = TestEnvironment.seed &+ run
        var random = RepeatableRandom(seed: seed)
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 9)
        for cluster in stride(from: 0, to: 512, by: 3) { builder.fill(1, guestCluster: cluster) }
        if run % 2 == 1 { builder.snapshot("kept") }
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        var model = try image.bytes(0..<256.KiB)
        for step in 0..<200 {
            let start = random.number(below: model.count / 512) * 512
            let count = min((1 + random.number(below: 24)) * 512, model.count - start)
            switch random.number(below: 10) {
            case 0:
                // Whole tables go, some of them with entries that no commit has written yet.
                let size = (1 + random.number(below: 500)) * 512
                try image.resize(to: UInt64(size), shrinking: true)
                model = Array(model.prefix(size))
                model += [UInt8](repeating: 0, count: size - model.count)
            case 1:
                try image.resize(to: UInt64(max(model.count, 200.KiB)))
                model += [UInt8](repeating: 0, count: max(0, 200.KiB - model.count))
            case 2: try image.flush()
            case 3...4:
                try image.discard(UInt64(start)..<UInt64(start + count))
                model.put([UInt8](repeating: 0, count: count), at: start)
            default:
                let bytes = [UInt8](repeating: UInt8(step % 250 + 2), count: count)
                try image.write(bytes, at: start)
                model.put(bytes, at: start)
            }
            if step % 20 == 0 {
                try #require(try image.bytes(0..<model.count) == model, "seed \(seed), \(step)")
            }
        }
        #expect(try image.bytes(0..<model.count) == model, "seed \(seed)")
        try image.close()
        try expectSound(device, "seed \(seed)")
        let after = try device.bytes.withUnsafeBytes {
            try ReferenceReader($0).read(0..<model.count)
        }
        #expect(after == model, "seed \(seed)")
    }
}

/// A client whose steps, whole clusters each, are noted for a `CrashJudge`.
final class NotedClient {
    private let image: Image
    private let record: RecordingDevice
    private let layout: CrashLayout
    private var id = 0

    init(_ image: Image, _ record: RecordingDevice, _ layout: CrashLayout) {
        (self.image, self.record, self.layout) = (image, record, layout)
    }

    func write(_ cluster: Int) throws {
        try change(cluster) { sectors, value in
            try image.write(
                SectorPattern.bytes(sectors: sectors, value: value), at: sectors.lowerBound * 512)
        }
    }

    func discard(_ cluster: Int) throws {
        try change(cluster, isZero: true) { sectors, _ in
            try image.discard(UInt64(sectors.lowerBound * 512)..<UInt64(sectors.upperBound * 512))
        }
    }

    private func change(
        _ cluster: Int, isZero: Bool = false, _ body: (Range<Int>, UInt64) throws -> Void
    ) throws {
        id += 1
        let first = cluster * layout.sectorsPerCluster
        let sectors = first..<first + layout.sectorsPerCluster
        let value = isZero ? 0 : UInt64(id) + 1000
        record.note(.issued(id: id, sectors: sectors, value: value))
        try body(sectors, value)
        record.note(.returned(id: id))
    }

    func flush() throws {
        id += 1
        record.note(.flushCalled(id: id))
        try image.flush()
        record.note(.flushReturned(id: id))
    }
}

/// A disk that takes its time before it punches a hole.
private final class SlowPunchDevice: ForwardingDevice {
    let base: any BlockDevice
    private let punches = Atomic(0)

    init(_ base: RAMDisk) { self.base = base }

    var punchCount: Int { punches.load(ordering: .relaxed) }
    var readsZerosPastEnd: Bool { true }

    func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        punches.add(1, ordering: .relaxed)
        usleep(2000)
        try base.punchHole(range)
    }
}
