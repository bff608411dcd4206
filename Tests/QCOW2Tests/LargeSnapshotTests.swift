import Glibc
import QCOW2
import Synchronization
import TestSupport
import Testing

/// A snapshot of a large disk is made quickly, and clients hardly notice.
@Suite("Large snapshots", .serialized)
struct LargeSnapshotTests {
    @Test("A snapshot of 1 TiB with 100,000 clusters holds clients for a moment only")
    func oneTebibyte() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try QemuImg.create(path, size: 1 << 40)
        // Room for the clusters: the file need not grow with each.
        try TestFile(path, O_RDWR).truncate(to: 7 << 30)
        let image = try Image.open(path)
        let clusterCount = 100_000
        let step = (((1 << 40) / clusterCount) >> 16) << 16
        for cluster in 0..<clusterCount {
            let start = UInt64(cluster * step)
            try image.allocate(start..<start + 65536, takingSpace: false)
        }
        try image.flush()
        let longest = Atomic<UInt64>(0)
        let writeCount = Atomic(0)
        let isDone = Atomic(false)
        let duration = Atomic<UInt64>(0)
        try onThreads(3) { index in
            guard index < 2 else {
                usleep(100_000)
                let start = Self.now()
                defer { isDone.store(true, ordering: .releasing) }
                try image.createSnapshot("large")
                duration.store(Self.now() - start, ordering: .relaxed)
                return
            }
            var random = RepeatableRandom(seed: UInt64(index) + TestEnvironment.seed)
            while !isDone.load(ordering: .acquiring) {
                let offset = random.number(below: clusterCount) * step + 512
                let start = Self.now()
                try image.write([UInt8](repeating: 7, count: 4096), at: offset)
                longest.max(Self.now() - start, ordering: .relaxed)
                writeCount.add(1, ordering: .relaxed)
            }
        }
        let milliseconds = duration.load(ordering: .relaxed) / 1_000_000
        let wait = longest.load(ordering: .relaxed) / 1_000_000
        print(
            "• a snapshot of 1 TiB, \(clusterCount) clusters: \(milliseconds) ms; "
                + "\(writeCount.load(ordering: .relaxed)) writes meanwhile, the longest \(wait) ms")
        try image.close()
        // Generous, for programs that are not optimized on machines that have other work.
        #expect(milliseconds < 600_000 && wait < 10_000)
        #expect(try QemuImg.check(path).status == 0)
    }

    private static func now() -> UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}
