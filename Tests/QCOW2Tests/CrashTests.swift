import QCOW2
import Synchronization
import TestSupport
import Testing

private let statesSoFar = Atomic(0)

/// Whatever moment the power goes, the image is whole and nothing that was synced is lost.
@Suite("Crash", .serialized)
struct CrashTests {
    /// States judged of each layout: all layouts together make more than 20,000.
    static let statesPerLayout = TestEnvironment.isLong ? 40_000 : 1_800

    @Test("No power cut breaks an invariant or loses what was synced", arguments: CrashLayout.all)
    func everyStateIsFine(_ layout: CrashLayout) throws {
        var count = 0
        var seed = TestEnvironment.seed
        while count < Self.statesPerLayout {
            let (record, initial) = try CrashWorkload(layout: layout, seed: seed).run()
            let (judged, fault) = CrashJudge.judge(record, layout, initial: initial, seed: seed)
            count += judged
            if let fault {
                Issue.record("\(layout.testDescription), seed \(seed): \(fault)")
                break
            }
            seed += 1
        }
        let total = statesSoFar.add(count, ordering: .relaxed).newValue
        print("• \(total) crash states judged, \(count) of them: \(layout.testDescription)")
    }

    @Test("The crash states number at least 20,000")
    func enough() {
        #expect(Self.statesPerLayout * CrashLayout.all.count >= 20_000)
    }

    @Test("A device that breaks the order is caught", arguments: MisorderingDevice.Mistake.allCases)
    func mistakesAreCaught(_ mistake: MisorderingDevice.Mistake) throws {
        let layout = CrashLayout(clusterBits: 9, guestClusters: 192, hasBacking: true)
        var count = 0
        for seed in TestEnvironment.seed..<TestEnvironment.seed + 20 {
            let (record, initial) = try CrashWorkload(layout: layout, seed: seed)
                .run { MisorderingDevice($0, mistake) }
            let (judged, fault) = CrashJudge.judge(record, layout, initial: initial, seed: seed)
            count += judged
            if let fault, !fault.hasPrefix("after a clean close") {
                print("• \(mistake): caught after \(count) states (\(fault))")
                return
            }
        }
        Issue.record("\(mistake) was not caught in \(count) states")
    }
}
