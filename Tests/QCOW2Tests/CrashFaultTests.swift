import QCOW2
import TestSupport
import Testing

/// Calls of the device fail under several clients, and then the power goes.
@Suite("Crash after faults", .serialized)
struct CrashFaultTests {
    private static let layouts = [
        CrashLayout(clusterBits: 9, guestClusters: 192, hasBacking: true),
        CrashLayout(clusterBits: 9, refcountOrder: 6, guestClusters: 192, hasCompressed: true),
        CrashLayout(clusterBits: 12, refcountOrder: 1, guestClusters: 64, commitInterval: 2),
        CrashLayout(clusterBits: 12, guestClusters: 48, hasSnapshot: false, hasBitmaps: true),
        CrashLayout(clusterBits: 14, guestClusters: 24, hasBacking: true, isExtended: true),
    ]

    /// One call, some until space is there again, and all from then on.
    private static let times = [1, 12, Int.max]

    @Test(
        "Whatever fails under several clients, what was flushed is there after a power cut",
        arguments: layouts)
    func faults(_ layout: CrashLayout) throws {
        var faultCount = 0
        var stateCount = 0
        let rounds = TestEnvironment.isLong ? 60 : 3
        for round in 0..<rounds {
            for kind in FaultyDevice.Kind.allCases {
                for times in Self.times {
                    let seed = TestEnvironment.seed &+ UInt64(round * 100 + faultCount)
                    let found = try run(layout, kind, times: times, seed: seed)
                    stateCount += found.stateCount
                    faultCount += found.isMet ? 1 : 0
                    if let fault = found.fault {
                        Issue.record("\(kind) \(times) times, \(layout), seed \(seed): \(fault)")
                        return
                    }
                }
            }
        }
        print(
            "• \(faultCount) faults injected, \(stateCount) crash states judged: "
                + layout.testDescription)
        #expect(faultCount > rounds * 4)
    }

    private func run(
        _ layout: CrashLayout, _ kind: FaultyDevice.Kind, times: Int, seed: UInt64
    ) throws -> (stateCount: Int, isMet: Bool, fault: String?) {
        var random = RepeatableRandom(seed: seed)
        let isFull = (kind == .write || kind == .reserve) && random.chance(oneIn: 2)
        // Opening reads the whole disk, and syncs.
        let first = kind == .read ? layout.guestClusters : kind == .flush ? 2 : 0
        let fault = FaultyDevice.Fault(
            kind, call: first + random.number(below: kind == .write || kind == .read ? 60 : 8),
            error: isFull ? .noSpace : .inputOutput, times: times,
            storing: random.chance(oneIn: 2) ? 512 : 0)
        var workload = CrashWorkload(layout: layout, seed: seed, threadCount: 3, stepCount: 24)
        workload.meetsFaults = true
        var faulty: FaultyDevice?
        let record: RecordingDevice
        var model: CrashModel
        do {
            (record, model) = try workload.run { record in
                let device = FaultyDevice(record, fault)
                faulty = device
                return device
            }
        } catch is ImageError {
            // It could not even be opened.
            return (0, false, nil)
        }
        model.leakCount = .max
        let verdict = CrashJudge.judge(
            record, layout, model: model, seed: seed,
            effort: CrashExplorer.Effort(prefixes: 3, singles: 2, subsets: 4))
        return (verdict.stateCount, faulty?.failed ?? false, verdict.fault)
    }
}
