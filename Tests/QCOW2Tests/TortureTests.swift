import QCOW2
import Synchronization
import TestSupport
import Testing

/// Many threads on the same few clusters, with next to no cache, judged as registers are.
@Suite("Torture", .serialized)
struct TortureTests {
    private static let stepCount = TestEnvironment.isLong ? 20_000 : 2_000
    private static let roundCount = 40

    private static let layouts = [
        CrashLayout(clusterBits: 9, refcountOrder: 3, guestClusters: 256, hasCompressed: true),
        CrashLayout(version: 2, clusterBits: 9, guestClusters: 256),
        CrashLayout(clusterBits: 12, guestClusters: 32, hasBacking: true, commitInterval: 1),
        CrashLayout(clusterBits: 14, guestClusters: 8, hasBacking: true, isExtended: true),
    ]

    @Test("Threads that run as they like see one disk", arguments: layouts)
    func free(_ layout: CrashLayout) throws {
        let device = RAMDisk()
        try layout.build().image.withUnsafeBytes { try device.write($0, at: 0) }
        try torture(device, layout, steps: Self.stepCount, seed: TestEnvironment.seed)
    }

    @Test("Threads that take turns see one disk", arguments: layouts)
    func takingTurns(_ layout: CrashLayout) throws {
        for seed in TestEnvironment.seed..<TestEnvironment.seed + 4 {
            let device = RecordingDevice(layout.build().image, seed: seed)
            try TestSupport.takingTurns(seed: seed) {
                try torture(device, layout, steps: Self.stepCount / 4, seed: seed)
            }
        }
    }

    /// What eight threads do and see in several rounds, after each of which the image is sound.
    private func torture(
        _ device: some BlockDevice, _ layout: CrashLayout, steps: Int, seed: UInt64
    ) throws {
        let clock = Atomic<UInt64>(1)
        let history = Mutex(RegisterHistory())
        for (sector, value) in layout.build().values.enumerated() {
            let start = RegisterHistory.Operation(
                isWrite: true, sector: sector, value: value, begin: 0, end: 0)
            history.withLock { $0.append(start) }
        }
        let roundStepCount = steps / Self.roundCount
        for first in stride(from: 0, to: steps, by: roundStepCount) {
            let image = try open(device, layout)
            try onThreads(8) { index in
                var client = Client(
                    image: image, layout: layout, number: index,
                    random: RepeatableRandom(seed: seed &+ UInt64(first * 8 + index)))
                for step in first..<first + roundStepCount { try client.act(step, clock) }
                history.withLock { $0.append(contentsOf: client.history) }
            }
            try image.close()
            try expectClean(device, "seed \(seed), after step \(first + roundStepCount)")
        }
        judge(history.withLock { $0 }, seed)
    }

    private func open(_ device: some BlockDevice, _ layout: CrashLayout) throws -> Image {
        let image = try Image.open(
            device, backing: layout.backing(),
            options: OpenOptions(
                cacheByteCount: 2 << layout.clusterBits, decompressedCacheByteCount: 4096))
        if let interval = layout.commitInterval {
            image.startCommitting(every: .milliseconds(interval))
        }
        return image
    }

    private func expectClean(_ device: some BlockDevice, _ moment: String) throws {
        var findings: [String] = []
        let check = try ImageCheck(device) { findings.append($0.description) }
        #expect(
            check.corruptionCount == 0 && check.leakCount == 0,
            "\(moment): \(findings.prefix(5))")
    }

    private func judge(_ history: RegisterHistory, _ seed: UInt64) {
        let faults = history.faults()
        #expect(faults.isEmpty, "seed \(seed): \(faults.count) faults")
        for fault in faults.prefix(5) { Issue.record("\(fault)") }
        print("• \(history.operationCount) operations on sectors are one history")
    }
}

/// One thread of a torture test, and what it did.
private struct Client {
    let image: Image
    let layout: CrashLayout
    let number: Int
    var random: RepeatableRandom
    var history = RegisterHistory()

    /// The last client makes and reads snapshots, the one before it syncs, the others do the rest.
    mutating func act(_ step: Int, _ clock: borrowing Atomic<UInt64>) throws {
        passTurn()
        switch number {
        case 7:
            if step % 16 == 0 { try keepAndRead(step, clock) } else { try read(clock) }
        case 6 where step % 8 == 0: try image.flush()
        case 0..<4: try random.number(below: 4) == 0 ? zero(clock) : write(step, clock)
        default: try read(clock)
        }
    }

    private mutating func someSectors() -> Range<Int> {
        // Most of it happens in few places.
        let count = 1 + random.number(below: min(2 * layout.sectorsPerCluster, 24))
        let bound = random.number(below: 3) == 0 ? layout.sectorCount : min(layout.sectorCount, 96)
        let start = random.number(below: bound - count + 1)
        return start..<start + count
    }

    private mutating func write(_ step: Int, _ clock: borrowing Atomic<UInt64>) throws {
        let sectors = someSectors()
        let value = UInt64(step) << 8 | UInt64(number) | 1 << 40
        let begin = clock.now()
        try image.write(
            SectorPattern.bytes(sectors: sectors, value: value), at: sectors.lowerBound * 512)
        note(sectors, begin, clock.now(), isWrite: true) { _ in value }
    }

    private mutating func zero(_ clock: borrowing Atomic<UInt64>) throws {
        var sectors = someSectors()
        let begin = clock.now()
        if layout.canDiscard, random.number(below: 2) == 0 {
            let cluster = sectors.lowerBound / layout.sectorsPerCluster
            sectors =
                cluster * layout.sectorsPerCluster..<(cluster + 1) * layout.sectorsPerCluster
            try image.discard(sectors.bytes)
        } else {
            try image.writeZeroes(sectors.bytes, keepingSpace: random.number(below: 2) == 0)
        }
        note(sectors, begin, clock.now(), isWrite: true) { _ in 0 }
    }

    private mutating func read(_ clock: borrowing Atomic<UInt64>) throws {
        let sectors = someSectors()
        let begin = clock.now()
        let bytes = try image.bytes(sectors.lowerBound * 512..<sectors.upperBound * 512)
        try note(sectors, begin, clock.now(), read: bytes)
    }

    /// A snapshot is a read of the whole disk at one moment.
    private mutating func keepAndRead(_ step: Int, _ clock: borrowing Atomic<UInt64>) throws {
        let begin = clock.now()
        try image.createSnapshot("s\(step)")
        let end = clock.now()
        let view = try image.openSnapshot("s\(step)")
        try note(0..<layout.sectorCount, begin, end, read: view.bytes(0..<layout.byteCount))
        try view.close()
        try image.deleteSnapshot("s\(step)")
    }

    private mutating func note(
        _ sectors: Range<Int>, _ begin: UInt64, _ end: UInt64, read bytes: [UInt8]
    ) throws {
        try bytes.withUnsafeBytes { buffer in
            try note(sectors, begin, end, isWrite: false) { sector in
                let start = (sector - sectors.lowerBound) * 512
                return try #require(
                    SectorPattern.value(
                        of: UnsafeRawBufferPointer(rebasing: buffer[start..<start + 512]),
                        sector: sector), "sector \(sector) holds foreign or torn bytes")
            }
        }
    }

    private mutating func note(
        _ sectors: Range<Int>, _ begin: UInt64, _ end: UInt64, isWrite: Bool,
        value: (Int) throws -> UInt64
    ) rethrows {
        for sector in sectors {
            history.append(
                .init(
                    isWrite: isWrite, sector: sector, value: try value(sector), begin: begin,
                    end: end))
        }
    }
}

extension Range<Int> {
    /// The guest bytes of these sectors.
    fileprivate var bytes: Range<UInt64> { UInt64(lowerBound * 512)..<UInt64(upperBound * 512) }
}

extension Atomic<UInt64> {
    /// A moment after all that were given before.
    fileprivate borrowing func now() -> UInt64 {
        add(1, ordering: .sequentiallyConsistent).newValue
    }
}

/// The judge finds what it is there for.
@Suite("Histories of registers")
struct RegisterHistoryTests {
    /// Writes are upper-case in `story`, reads lower-case: `(letter, begin, end)`; z is zero.
    private func faults(_ story: [(Character, UInt64, UInt64)]) -> [String] {
        var history = RegisterHistory()
        for (letter, begin, end) in story {
            let value = letter.uppercased() == "Z" ? 0 : UInt64(letter.uppercased().utf8.first!)
            history.append(
                .init(
                    isWrite: letter.isUppercase, sector: 0, value: value, begin: begin, end: end))
        }
        return history.faults()
    }

    @Test("What a register may do passes")
    func right() {
        #expect(faults([("Z", 0, 0), ("z", 1, 2), ("A", 3, 6), ("a", 4, 5), ("a", 7, 8)]) == [])
        // Two writes at once may take effect in either order.
        #expect(faults([("A", 1, 4), ("B", 2, 3), ("b", 5, 6)]) == [])
        #expect(faults([("A", 1, 4), ("B", 2, 3), ("a", 5, 6)]) == [])
        #expect(faults([("A", 1, 2), ("Z", 3, 6), ("a", 4, 5), ("z", 7, 8)]) == [])
    }

    @Test("A stale read, a lost write and a read of the future are faults")
    func wrong() {
        #expect(faults([("A", 1, 2), ("B", 3, 4), ("a", 5, 6)]).count == 1)
        #expect(faults([("A", 1, 2), ("Z", 3, 4), ("a", 5, 6)]).count == 1)
        #expect(faults([("Z", 0, 0), ("A", 1, 2), ("z", 3, 4)]).count == 1)
        #expect(faults([("a", 1, 2), ("A", 3, 4)]).count == 1)
        #expect(faults([("a", 1, 2)]).count == 1)
        // New, then old again.
        #expect(
            faults([("A", 1, 10), ("B", 1, 10), ("a", 11, 12), ("b", 13, 14), ("a", 15, 16)])
                .count == 1)
    }
}
