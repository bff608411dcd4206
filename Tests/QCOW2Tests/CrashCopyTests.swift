import QCOW2
import TestSupport
import Testing

/// The power goes while a whole disk is copied to a new image.
@Suite("Crash while copying", .serialized)
struct CrashCopyTests {
    @Test(
        "A copy that is cut off is no image yet, or one that holds a part of the disk",
        arguments: [9, 12, 16] as [UInt64], [false, true])
    func converts(clusterBits: UInt64, compresses: Bool) throws {
        let layout = CrashLayout(clusterBits: Int(clusterBits), guestClusters: 1)
        let sectorCount = 600
        var source: [UInt8] = []
        for start in stride(from: 0, to: sectorCount, by: 20) {
            source += SectorPattern.bytes(
                sectors: start..<start + 20, value: start % 60 == 0 ? 0 : 5)
        }
        let record = RecordingDevice([], name: "copy.qcow2")
        var options = CreateOptions()
        options.clusterByteCount = 1 << clusterBits
        var conversion = Conversion(to: .qcow2(options))
        conversion.compresses = compresses
        try takingTurns(seed: TestEnvironment.seed) {
            let disk = try SourceDisk(RecordingDevice(source))
            try conversion.run(from: disk, to: record)
        }
        var explorer = CrashExplorer(initial: [], seed: TestEnvironment.seed)
        for moment in record.moments {
            if case .flushed = moment {
                let found = explorer.explore { fault(in: $0, layout, source, isComplete: false) }
                #expect(found == nil, "seed \(TestEnvironment.seed), state \(explorer.stateCount)")
                if found != nil { return }
            }
            explorer.advance(moment)
        }
        let end = explorer.withDurable { fault(in: $0, layout, source, isComplete: true) }
        #expect(end == nil)
        print("• \(explorer.stateCount) crash states judged of a copy, \(1 << clusterBits) B")
    }

    private func fault(
        in state: UnsafeRawBufferPointer, _ layout: CrashLayout, _ source: [UInt8],
        isComplete: Bool
    ) -> String? {
        if !isComplete, state.number(at: 0, as: UInt32.self) == 0 { return nil }
        do throws(ReferenceReader.Fault) {
            let found = try CrashFinding(in: state, layout)
            for (sector, value) in found.disk.enumerated() {
                let wanted = source.withUnsafeBytes { CrashFinding.value(of: sector, in: $0) }
                if value == wanted || !isComplete && value == 0 { continue }
                return "sector \(sector) holds \(CrashModel.words(value))"
            }
            return found.disk.count * 512 == source.count ? nil : "another size"
        } catch { return "\(error)" }
    }
}
