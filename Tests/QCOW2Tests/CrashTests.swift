import Glibc
import QCOW2
import Synchronization
import TestSupport
import Testing

private let statesSoFar = Atomic(0)

/// Whatever moment the power goes, the image is whole and nothing that was synced is lost.
///
/// A fault names its seed, layout and state.  `Tests/run --seed SEED --filter QCOW2Tests.Crash`
/// makes the same records and states again: that layout's first simulation has that seed.
@Suite("Crash", .serialized)
struct CrashTests {
    static let layouts =
        CrashLayout.all + CrashLayout.withSubclusters + CrashLayout.withBitmaps
        + CrashLayout.withDataFile + CrashLayout.withEncryption
    static let leastStateCount = 100_000
    /// States judged of each layout.
    static let statesPerLayout =
        (leastStateCount / layouts.count + 1) * (TestEnvironment.isLong ? 20 : 1)

    @Test(
        "Trap 55: power cuts while snapshots and sizes change leave no wrong state",
        arguments: CrashLayout.all)
    func everyStateIsFine(_ layout: CrashLayout) throws { try simulate(layout) }

    @Test(
        "Trap 62: nor do they where clusters have subclusters",
        arguments: CrashLayout.withSubclusters
    )
    func everyStateOfSubclustersIsFine(_ layout: CrashLayout) throws { try simulate(layout) }

    @Test("A power cut leaves a bitmap in use, gone, or right", arguments: CrashLayout.withBitmaps)
    func everyBitmapIsRight(_ layout: CrashLayout) throws { try simulate(layout) }

    @Test("No power cut sets image and data file at odds", arguments: CrashLayout.withDataFile)
    func everyStateOfTwoFilesIsFine(_ layout: CrashLayout) throws { try simulate(layout) }

    @Test("Nor does one garble what is encrypted", arguments: CrashLayout.withEncryption)
    func everyEncryptedStateIsFine(_ layout: CrashLayout) throws { try simulate(layout) }

    private func simulate(_ layout: CrashLayout) throws {
        let count = Atomic(0)
        let next = Atomic(TestEnvironment.seed)
        let fault = Mutex<String?>(nil)
        try onThreads(2) { _ in
            while count.load(ordering: .relaxed) < Self.statesPerLayout,
                fault.withLock({ $0 == nil })
            {
                let seed = next.add(1, ordering: .relaxed).oldValue
                let outcome = CrashSimulation(layout: layout, seed: seed).run()
                count.add(outcome.stateCount, ordering: .relaxed)
                if let found = outcome.fault { fault.withLock { $0 = $0 ?? found } }
            }
        }
        if let found = fault.withLock({ $0 }) { Issue.record("\(found)") }
        let judged = count.load(ordering: .relaxed)
        #expect(judged >= Self.statesPerLayout)
        let total = statesSoFar.add(judged, ordering: .relaxed).newValue
        print("• \(total) crash states judged, \(judged) of them: \(layout.testDescription)")
    }

    @Test("The crash states number at least 100,000")
    func enough() {
        #expect(Self.statesPerLayout * Self.layouts.count >= 100_000)
    }

    @Test(
        "A seed replays its record, write by write",
        .enabled(
            if: getenv("SWIFT_DETERMINISTIC_HASHING") != nil,
            "sets have another order each time without SWIFT_DETERMINISTIC_HASHING=1"),
        arguments: [layouts[0], layouts[2], CrashLayout.withBitmaps[2]])
    func replays(_ layout: CrashLayout) throws {
        let records = try (0..<2).map { _ in
            try CrashWorkload(layout: layout, seed: TestEnvironment.seed, changeCount: 6).run()
                .record
        }
        #expect(records[0].moments.count > 300)
        let isSame = zip(records[0].moments, records[1].moments).allSatisfy { "\($0)" == "\($1)" }
        #expect(isSame && records[0].moments.count == records[1].moments.count)
    }

    @Test("A device that breaks the order is caught", arguments: MisorderingDevice.Mistake.allCases)
    func mistakesAreCaught(_ mistake: MisorderingDevice.Mistake) throws {
        let layout = CrashLayout(clusterBits: 9, guestClusters: 192, hasBacking: true)
        try expectCaught("\(mistake)", layout) { try $0.run { MisorderingDevice($0, mistake) } }
    }

    @Test("A data file of which syncs are left out is caught", arguments: [1, 2])
    func missingSyncsAreCaught(every number: Int) throws {
        let layout = CrashLayout(
            clusterBits: 9, guestClusters: 192, hasSnapshot: false, hasBacking: true,
            hasDataFile: true)
        try expectCaught("every sync of \(number) left out", layout) {
            try $0.run(data: { ForgetfulDevice($0, every: number) })
        }
    }

    private func expectCaught(
        _ mistake: String, _ layout: CrashLayout,
        _ run: (CrashWorkload) throws -> (RecordingDevice, CrashModel)
    ) throws {
        var count = 0
        for seed in TestEnvironment.seed..<TestEnvironment.seed + 20 {
            let (record, model) = try run(CrashWorkload(layout: layout, seed: seed))
            let verdict = CrashJudge.judge(record, layout, model: model, seed: seed)
            count += verdict.stateCount
            if let fault = verdict.fault {
                print("• \(mistake): caught after \(count) states (\(fault))")
                return
            }
        }
        Issue.record("\(mistake) was not caught in \(count) states")
    }
}

/// A device that leaves out one sync of so many.
private final class ForgetfulDevice: ForwardingDevice {
    let base: any BlockDevice
    private let number: Int
    private let count = Atomic(0)

    init(_ base: any BlockDevice, every number: Int) { (self.base, self.number) = (base, number) }

    func flush() throws(SystemError) {
        if count.add(1, ordering: .relaxed).newValue % number != 0 { try base.flush() }
    }
}
