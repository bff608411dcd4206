import Foundation
import Synchronization
import TestSupport
import Testing

/// A daemon that is killed at any moment, under load, again and again on one image.
@Suite("Killed daemons", .serialized, .enabledWhereMountable)
struct KillTests {
    static let roundCount = TestEnvironment.isLong ? 400 : 14
    static let slotCount = 512

    @Test(
        "kill -9 loses nothing that was synced or is older than the commit interval",
        arguments: [["cluster_size=4k"], ["cluster_size=16k,extended_l2=on"]])
    func rounds(options: [String]) throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try QemuImg.create(path, size: Self.slotCount * Ledger.slotByteCount, options: options)
        try QemuImg.snapshot(path, create: "kept")
        let ledger = Ledger(slotCount: Self.slotCount)
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        for round in 0..<Self.roundCount {
            let words = "seed \(TestEnvironment.seed), round \(round)"
            // Every seventh run is long enough for the timer to have its say.
            let pause = round % 7 == 6 ? 5_000_000 : 20_000 + random.number(below: 900_000)
            try loadAndKill(path, folder, ledger, after: UInt32(pause), seed: random.next(), words)
            let check = try QemuImg.check(path)
            #expect(check.status == 0 || check.status == 3, "\(words): \(check)")
            let mount = try TestMount(path, in: folder)
            try ledger.judge(mount.open(O_RDONLY), words)
            try mount.unmount()
        }
        print("• \(Self.roundCount) daemons killed, \(ledger.counts), \(options)")
    }

    @Test(
        "kill -9 ends the mount although the daemon just waits for what it holds itself",
        .enabled(if: TestEnvironment.has("xfs_io"), "xfsprogs is missing"))
    func waitsForItself() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try QemuImg.create(path, size: 64.MiB)
        for round in 0..<(TestEnvironment.isLong ? 100 : 5) {
            let mount = try TestMount(path, in: folder, options: ["--writeback", "on"])
            let daemon = try mount.daemon()
            // Each look for holes makes the kernel write what it keeps back.
            let users = try [
                "dd if=/dev/zero of=\(mount.disk) bs=1M count=60 conv=notrunc status=none",
                "xfs_io -c 'seek -a 0' \(mount.disk)",
            ].map { try Command.start(["sh", "-c", "while \($0) >&2; do :; done"]) }
            usleep(300_000 + UInt32(round) * 37_000)
            kill(daemon, SIGKILL)
            do {
                for user in users { _ = try user.wait(timeout: 20) }
            } catch {
                // Otherwise nobody who uses the mount could be ended.
                _ = try Command.run(["umount", "-f", mount.mountpoint])
                throw error
            }
            try Command.require([TestEnvironment.program, "umount", mount.mountpoint])
            mount.wasUnmounted()
        }
        #expect(try QemuImg.check(path).status != 2)
    }

    /// Mounts, lets four threads write, kills the daemon and cleans up as a person would.
    private func loadAndKill(
        _ path: String, _ folder: TemporaryDirectory, _ ledger: Ledger, after pause: UInt32,
        seed: UInt64, _ words: String
    ) throws {
        let mount = try TestMount(path, in: folder, options: ["--commit-interval", "1"])
        let daemon = try mount.daemon()
        let disk = mount.disk
        try onThreads(5) { thread in
            if thread == 4 {
                usleep(pause)
                kill(daemon, SIGKILL)
                return ledger.daemonWasKilled()
            }
            // The descriptor outlives the daemon; its calls say so.
            guard let file = try? TestFile(disk, O_RDWR) else { return }
            var random = RepeatableRandom(seed: seed &+ UInt64(thread))
            while (try? ledger.step(file, thread: thread, of: 4, &random)) != nil {}
        }
        #expect(eventually { !isRunning(daemon) }, "\(words)")
        let cleaned = try qcowfs("umount", mount.mountpoint)
        #expect(cleaned.status == 0, "\(words): \(cleaned)")
        #expect(!TestMount.isMountpoint(mount.mountpoint), "\(words)")
        mount.wasUnmounted()
    }
}

/// What was written where, and what of it must still be there.
///
/// A slot belongs to one thread.  Its writes and holes are numbered, so that what is found names
/// the moment it comes from.
private final class Ledger: Sendable {
    static let slotByteCount = 16 << 10
    /// The timer's second, and time for the commit itself on a busy machine.
    private static let interval: Duration = .seconds(3)

    fileprivate struct Slot {
        var issued: UInt64 = 0
        var returned: UInt64 = 0
        var synced: UInt64 = 0
        /// Numbers that are holes, and when each number returned.
        var holes: Set<UInt64> = [0]
        var times: [(number: UInt64, at: ContinuousClock.Instant)] = []
    }

    private let slots: Mutex<[Slot]>
    private let killed = Mutex(ContinuousClock.now)
    private let syncs = Atomic(0)

    init(slotCount: Int) { slots = Mutex(Array(repeating: Slot(), count: slotCount)) }

    var counts: String {
        let writes = slots.withLock { $0.reduce(0) { $0 + $1.issued } }
        return "\(writes) writes and holes, \(syncs.load(ordering: .relaxed)) syncs"
    }

    func daemonWasKilled() { killed.withLock { $0 = .now } }

    /// One write, hole or sync.
    func step(
        _ file: TestFile, thread: Int, of threads: Int, _ random: inout RepeatableRandom
    ) throws {
        if random.chance(oneIn: 50) { return try sync(file) }
        let count = slots.withLock { $0.count }
        let index = random.number(below: count / threads) * threads + thread
        let isHole = random.chance(oneIn: 8)
        let number = slots.withLock { slots -> UInt64 in
            slots[index].issued += 1
            if isHole { slots[index].holes.insert(slots[index].issued) }
            return slots[index].issued
        }
        let range = index * Self.slotByteCount..<(index + 1) * Self.slotByteCount
        if isHole {
            try file.punch(range)
        } else {
            let sectors = range.lowerBound / 512..<range.upperBound / 512
            try file.write(
                SectorPattern.bytes(sectors: sectors, value: number), at: range.lowerBound)
        }
        slots.withLock {
            $0[index].returned = number
            $0[index].times.append((number, .now))
        }
    }

    /// What had returned before the call is there for good once it returns.
    private func sync(_ file: TestFile) throws {
        let before = slots.withLock { $0.map(\.returned) }
        try file.sync()
        syncs.add(1, ordering: .relaxed)
        slots.withLock { slots in
            for index in slots.indices {
                slots[index].synced = max(slots[index].synced, before[index])
            }
        }
    }

    /// Compares the disk with what may be there; what is there counts as kept from now on.
    func judge(_ file: TestFile, _ words: String) throws {
        let deadline = killed.withLock { $0 } - Self.interval
        var kept = slots.withLock { $0 }
        for index in kept.indices {
            let old = kept[index].times.last { $0.at < deadline }?.number ?? 0
            let least = max(kept[index].synced, old)
            let start = index * Self.slotByteCount
            let bytes = try file.read(start..<start + Self.slotByteCount)
            var lowest = UInt64.max
            for sector in 0..<Self.slotByteCount / 512 {
                let found = bytes[sector * 512..<(sector + 1) * 512].withUnsafeBytes {
                    SectorPattern.value(of: $0, sector: start / 512 + sector)
                }
                let number = kept[index].number(of: found, atLeast: least)
                let content = found.map { "number \($0)" } ?? "foreign or torn bytes"
                try #require(
                    number != nil,
                    """
                    \(words): sector \(start / 512 + sector) holds \(content), where \(least) to \
                    \(kept[index].issued) may be (synced: \(kept[index].synced))
                    """)
                lowest = min(lowest, number ?? 0)
            }
            (kept[index].synced, kept[index].returned) = (lowest, lowest)
            kept[index].times = []
        }
        slots.withLock { $0 = kept }
    }
}

extension Ledger.Slot {
    /// The number that a sector's content stands for, if it is one that may be there.
    fileprivate func number(of found: UInt64?, atLeast least: UInt64) -> UInt64? {
        guard let found else { return nil }
        if found == 0 { return holes.filter { $0 >= least }.min() }
        return found >= least && found <= issued ? found : nil
    }
}
