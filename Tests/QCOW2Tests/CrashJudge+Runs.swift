import TestSupport
import Testing

/// Whole runs of a crash test.
extension CrashJudge {
    /// States judged of each layout: all layouts together make more than 20,000.
    static let statesPerLayout = TestEnvironment.isLong ? 40_000 : 1_800

    /// Judges the crash states of one seeded workload after the other until there are enough, and
    /// returns how many there were.
    static func judgeStates(of layout: CrashLayout) throws -> Int {
        var count = 0
        var seed = TestEnvironment.seed
        while count < statesPerLayout {
            let (record, initial) = try CrashWorkload(layout: layout, seed: seed).run()
            let (judged, fault) = judge(record, layout, initial: initial, seed: seed)
            count += judged
            if let fault {
                Issue.record("\(layout.testDescription), seed \(seed): \(fault)")
                break
            }
            seed += 1
        }
        return count
    }

    /// Expects that some crash state gives away a device that makes `mistake`, on which `run` runs
    /// a workload.
    static func expectCaught(
        _ mistake: String, _ layout: CrashLayout,
        run: (CrashWorkload) throws -> (RecordingDevice, [UInt64])
    ) throws {
        var count = 0
        for seed in TestEnvironment.seed..<TestEnvironment.seed + 20 {
            let (record, initial) = try run(CrashWorkload(layout: layout, seed: seed))
            let (judged, fault) = judge(record, layout, initial: initial, seed: seed)
            count += judged
            if let fault, !fault.hasPrefix("after a clean close") {
                print("• \(mistake): caught after \(count) states (\(fault))")
                return
            }
        }
        Issue.record("\(mistake): not caught in \(count) states")
    }
}
