import Foundation
import QCOW2
import TestSupport
import Testing

/// Whatever the bytes of an image are, they get an error or bytes, soon.
@Suite("Hostile images", .serialized)
struct HostileImageTests {
    static let imageCount = TestEnvironment.isLong ? 100_000 : 6_000

    @Test("the images that the others are made from are sound")
    func seedsAreSound() throws {
        for (number, bytes) in HostileImage.seeds.enumerated() {
            let device = RecordingDevice(bytes, yielding: false)
            let check = try ImageCheck(device)
            #expect(check.corruptionCount == 0 && check.leakCount == 0, "seed \(number)")
            #expect(HostileImage.fault(of: bytes) == nil, "seed \(number)")
        }
    }

    @Test("damaged images are used without a crash, a hang or a write that must not be")
    func damaged() throws {
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        var slowest = 0.0
        for number in 0..<Self.imageCount {
            let bytes = HostileImage.mutant(&random)
            let start = Self.processorTime()
            if let fault = HostileImage.fault(of: bytes) {
                Issue.record("seed \(TestEnvironment.seed), image \(number): \(fault)")
            }
            let took = Self.processorTime() - start
            slowest = max(slowest, took)
            // 1 s for each MiB of the file, at most 10 s.
            try #require(took < 10, "image \(number) took \(took) s")
        }
        print("• \(Self.imageCount) hostile images used, the slowest in \(slowest) s")
    }

    @Test("an L1 table a million times too long, far behind the end, makes nothing slow")
    func longL1Table() throws {
        for (number, seed) in HostileImage.seeds.enumerated() {
            var bytes = seed
            bytes[37] = 0x2D  // of the number of entries
            bytes[42] = 0x1D  // of the offset: 29 TiB
            let start = Self.processorTime()
            #expect(HostileImage.fault(of: bytes) == nil, "seed \(number)")
            #expect(Self.processorTime() - start < 10, "seed \(number)")
        }
    }

    /// In seconds, of all our threads: other programs on the machine make no difference.
    private static func processorTime() -> Double {
        var time = timespec()
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}
