import QCOW2
import Synchronization
import TestSupport
import Testing

/// Power cuts while an image and its data file are written: any mixture of both may be left.
@Suite("Crash with a data file", .serialized)
struct DataFileCrashTests {
    @Test(
        "No power cut shows a third thing, in the disk or in the raw data file",
        arguments: CrashLayout.withDataFile)
    func everyStateIsFine(_ layout: CrashLayout) throws {
        let count = try CrashJudge.judgeStates(of: layout)
        print("• \(count) crash states judged: \(layout.testDescription)")
    }

    @Test("A data file of which syncs are left out is caught", arguments: [1, 2])
    func missingSyncsAreCaught(every number: Int) throws {
        let layout = CrashLayout(
            clusterBits: 9, guestClusters: 192, hasSnapshot: false, hasBacking: true,
            hasDataFile: true)
        try CrashJudge.expectCaught("every sync of \(number) left out", layout) {
            try $0.run(data: { ForgetfulDevice($0, every: number) })
        }
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
