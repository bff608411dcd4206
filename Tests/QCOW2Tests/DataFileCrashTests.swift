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
        var count = 0
        var seed = TestEnvironment.seed
        while count < CrashTests.statesPerLayout {
            let (record, initial) = try CrashWorkload(layout: layout, seed: seed).run()
            let (judged, fault) = CrashJudge.judge(record, layout, initial: initial, seed: seed)
            count += judged
            if let fault {
                Issue.record("\(layout.testDescription), seed \(seed): \(fault)")
                break
            }
            seed += 1
        }
        print("• \(count) crash states judged: \(layout.testDescription)")
    }

    @Test("A data file of which syncs are left out is caught", arguments: [1, 2])
    func missingSyncsAreCaught(every number: Int) throws {
        let layout = CrashLayout(
            clusterBits: 9, guestClusters: 192, hasSnapshot: false, hasBacking: true,
            hasDataFile: true)
        var count = 0
        for seed in TestEnvironment.seed..<TestEnvironment.seed + 20 {
            let (record, initial) = try CrashWorkload(layout: layout, seed: seed)
                .run(data: { ForgetfulDevice($0, every: number) })
            let (judged, fault) = CrashJudge.judge(record, layout, initial: initial, seed: seed)
            count += judged
            if let fault, !fault.hasPrefix("after a clean close") {
                print("• every sync of \(number) left out: caught after \(count) (\(fault))")
                return
            }
        }
        Issue.record("not caught in \(count) states")
    }
}

/// A device that leaves out one sync of so many.
private final class ForgetfulDevice: BlockDevice {
    private let base: any BlockDevice
    private let number: Int
    private let count = Atomic(0)

    init(_ base: any BlockDevice, every number: Int) { (self.base, self.number) = (base, number) }

    var name: String { base.name }
    var readsZerosPastEnd: Bool { base.readsZerosPastEnd }
    func byteCount() throws(SystemError) -> UInt64 { try base.byteCount() }
    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(SystemError)
        -> Int
    {
        try base.read(into: buffer, at: offset)
    }
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        try base.write(bytes, at: offset)
    }
    func flush() throws(SystemError) {
        if count.add(1, ordering: .relaxed).newValue % number != 0 { try base.flush() }
    }
    func resize(to byteCount: UInt64) throws(SystemError) { try base.resize(to: byteCount) }
    func punchHole(_ range: Range<UInt64>) throws(SystemError) { try base.punchHole(range) }
}
