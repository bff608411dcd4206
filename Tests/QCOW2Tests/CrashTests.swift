import QCOW2
import Synchronization
import TestSupport
import Testing

private let statesSoFar = Atomic(0)

/// Whatever moment the power goes, the image is whole and nothing that was synced is lost.
@Suite("Crash", .serialized)
struct CrashTests {
    @Test("No power cut breaks an invariant or loses what was synced", arguments: CrashLayout.all)
    func everyStateIsFine(_ layout: CrashLayout) throws {
        let count = try CrashJudge.judgeStates(of: layout)
        let total = statesSoFar.add(count, ordering: .relaxed).newValue
        print("• \(total) crash states judged, \(count) of them: \(layout.testDescription)")
    }

    @Test("The crash states number at least 20,000")
    func enough() {
        #expect(CrashJudge.statesPerLayout * CrashLayout.all.count >= 20_000)
    }

    @Test("A device that breaks the order is caught", arguments: MisorderingDevice.Mistake.allCases)
    func mistakesAreCaught(_ mistake: MisorderingDevice.Mistake) throws {
        let layout = CrashLayout(clusterBits: 9, guestClusters: 192, hasBacking: true)
        try CrashJudge.expectCaught("\(mistake)", layout) {
            try $0.run { MisorderingDevice($0, mistake) }
        }
    }
}
