import QCOW2
import Synchronization
import TestSupport
import Testing

/// Whatever call to the device fails, the image stays whole and the failure is told.
///
/// Threads take turns meanwhile: one that waited for ever would end the program with a message.
@Suite("Device faults", .serialized)
struct FaultTests {
    private static let faults: [(kind: FaultyDevice.Kind, error: SystemError)] = [
        (.write, .inputOutput), (.write, .noSpace), (.read, .inputOutput), (.flush, .inputOutput),
        (.punch, .inputOutput), (.resize, .inputOutput), (.reserve, .noSpace),
    ]

    @Test(
        "Trap 40: whatever call fails, counts are high enough and nothing that was flushed is lost",
        arguments: FaultedOperation.onImages + FaultedOperation.onDevices)
    func everyCall(_ operation: FaultedOperation) throws {
        var count = 0
        for fault in Self.faults {
            for times in [1, 5, Int.max] {
                var call = 0
                while try fails(operation, fault.kind, fault.error, call: call, times: times) {
                    count += 1
                    call += TestEnvironment.isLong || call < 20 ? 1 : 7
                }
            }
        }
        print("• \(count) faults injected: \(operation.testDescription)")
        #expect(count > 20)
    }

    /// Runs the operation with one fault, and judges what it left; false where it met none.
    private func fails(
        _ operation: FaultedOperation, _ kind: FaultyDevice.Kind, _ error: SystemError, call: Int,
        times: Int
    ) throws -> Bool {
        let words = "\(operation.testDescription): \(kind) \(call), \(times) times, \(error)"
        let bytes = try Self.image(for: operation)
        let device = RecordingDevice(bytes)
        let faulty = FaultyDevice(
            device,
            FaultyDevice.Fault(
                kind, call: call, error: error, times: times, storing: call % 2 == 0 ? 0 : 512))
        let acknowledged = Mutex<[Range<Int>]>([])
        var told: (any Error)?
        do {
            try takingTurns(seed: UInt64(call)) {
                try operation.run(faulty, operation.layout) { sectors in
                    acknowledged.withLock { $0.append(sectors) }
                }
            }
        } catch { told = error }
        guard faulty.failed else { return false }
        if kind == .flush { try #require(told != nil, "\(words): was told to nobody") }
        let before = try Self.finding(bytes, operation)
        let clean = RecordingDevice(bytes, yielding: false)
        try operation.run(clean, operation.layout) { _ in }
        let after = try Self.finding(clean.bytes, operation)
        let found: CrashFinding
        do { found = try Self.finding(device.bytes, operation) } catch {
            throw ReferenceReader.Fault("\(words): \(error)")
        }
        try judge(found, before, after, words, isTold: told != nil, acknowledged.withLock { $0 })
        return true
    }

    private func judge(
        _ found: CrashFinding, _ before: CrashFinding, _ after: CrashFinding, _ words: String,
        isTold: Bool, _ acknowledged: [Range<Int>]
    ) throws {
        try #require([before.disk.count, after.disk.count].contains(found.disk.count), "\(words)")
        if !isTold { try #require(found.disk == after.disk, "\(words): not told") }
        for (sector, value) in found.disk.enumerated() {
            let allowed = [before, after].filter { sector < $0.disk.count }.map { $0.disk[sector] }
            let isNew = sector >= before.disk.count && value == 0
            // What was written before the disk went back to a snapshot.
            let isBetween = isTold && value == FaultedOperation.written
            try #require(
                isNew || isBetween || allowed.contains(value), "\(words): sector \(sector)")
        }
        for sector in acknowledged.joined() {
            try #require(
                found.disk[sector] == after.disk[sector], "\(words): flushed sector \(sector)")
        }
        for (name, values) in found.snapshots where name == "kept" {
            try #require(values == before.snapshots[name], "\(words): the snapshot has changed")
        }
        let old = Set(before.bitmaps.map(\.name))
        for bitmap in found.bitmaps where !bitmap.isInUse && old.contains(bitmap.name) {
            let wanted = [before, after].flatMap(\.bitmaps).filter { $0.name == bitmap.name }
            try #require(
                wanted.contains { Set($0.marked).isSubset(of: bitmap.marked) },
                "\(words): bitmap \(bitmap.name)")
        }
    }

    /// An image to repair wastes clusters.
    private static func image(for operation: FaultedOperation) throws -> [UInt8] {
        let bytes = operation.layout.build().image
        guard operation.testDescription == "repair" else { return bytes }
        let block = try bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            return Int(reader.number(reader.refcountTableOffset))
        }
        var leaking = bytes
        for cluster in 8..<16 { leaking.put(UInt16(9), at: block + cluster * 2) }
        return leaking
    }

    private static func finding(
        _ bytes: [UInt8], _ operation: FaultedOperation
    ) throws -> CrashFinding {
        try bytes.withUnsafeBytes { try CrashFinding(in: $0, operation.layout) }
    }

    @Test("Trap 73: after a failed sync the image takes no writes, and every later flush fails")
    func failedSyncIsFinal() throws {
        let bytes = CrashLayout(clusterBits: 9, guestClusters: 192).build().image
        for call in 2..<8 {
            let faulty = FaultyDevice(
                RecordingDevice(bytes, yielding: false), FaultyDevice.Fault(.flush, call: call))
            let image = try Image.open(faulty)
            var failures = 0
            for step in 0..<10 {
                do {
                    try image.write([UInt8](repeating: 1, count: 2048), at: step * 4096)
                    try image.flush()
                    if failures > 0 { Issue.record("step \(step) succeeded after a failed sync") }
                } catch { failures += 1 }
            }
            #expect(failures > 0)
            #expect(throws: ImageError.self) { try image.close() }
        }
    }

    @Test("Where space is missing for a while, everything is there once it is back")
    func spaceReturns() throws {
        let layout = CrashLayout(clusterBits: 9, guestClusters: 192)
        for call in 0..<40 {
            let device = RecordingDevice(layout.build().image, yielding: false)
            let faulty = FaultyDevice(
                device, FaultyDevice.Fault(.write, call: call, error: .noSpace, times: 6))
            let image = try Image.open(faulty)
            var model = layout.build().values
            for sector in stride(from: 0, to: 190, by: 3) {
                var attempts = 0
                while true {
                    do {
                        let sectors = sector..<sector + 2
                        try image.write(
                            SectorPattern.bytes(sectors: sectors, value: 100), at: sector * 512)
                        try image.flush()
                        break
                    } catch {
                        #expect(error.code == 28, "\(error)")
                        attempts += 1
                        try #require(attempts < 20, "write \(call): the space has no effect")
                    }
                }
                model[sector] = 100
                model[sector + 1] = 100
            }
            try image.close()
            let found = try device.bytes.withUnsafeBytes { try CrashFinding(in: $0, layout) }
            #expect(found.disk == model.map(Optional.some), "write \(call)")
        }
    }

    /// The failed command may have got as far as the snapshot table: then it counts as done.
    @Test(
        "A change of the snapshots that lacks space leaves right counts and flags once closed",
        arguments: [2, 3] as [UInt32], ["create", "delete", "apply"])
    func failedSnapshot(version: UInt32, verb: String) throws {
        let layout = CrashLayout(version: version, clusterBits: 9, guestClusters: 192)
        var (failures, judged) = (0, 0)
        for call in 0..<60 {
            for isRepeated in [false, true] {
                let device = RecordingDevice(layout.build().image, yielding: false)
                let faulty = FaultyDevice(
                    device, FaultyDevice.Fault(.write, call: call, error: .noSpace, times: 8))
                let image = try Image.open(faulty)
                func change() throws {
                    switch verb {
                    case "create": try image.createSnapshot("new")
                    case "delete": try image.deleteSnapshot("kept")
                    default: try image.applySnapshot("kept")
                    }
                }
                try? image.write(SectorPattern.bytes(sectors: 3..<40, value: 100), at: 3 * 512)
                do { try change() } catch { failures += 1 }
                for _ in 0..<10 where (try? image.flush()) == nil {}
                // What is not there any more is not deleted again.
                if isRepeated { try? change() }
                // The fault may last as long as that; then it is told.
                do { try image.close() } catch { continue }
                judged += 1
                let check = try ImageCheck(RecordingDevice(device.bytes, yielding: false))
                #expect(
                    check.corruptionCount == 0 && check.leakCount == 0,
                    "write \(call), repeated: \(isRepeated)")
            }
        }
        #expect(failures > 10 && judged > 60)
    }

    @Test("A change of size that fails leaves the size that clients go on with")
    func failedResize() throws {
        let layout = CrashLayout(clusterBits: 9, guestClusters: 192, hasSnapshot: false)
        for byteCount in [UInt64(16 << 10), 400 << 10] {
            for call in 0..<30 {
                let device = RecordingDevice(layout.build().image, yielding: false)
                let faulty = FaultyDevice(
                    device, FaultyDevice.Fault(.write, call: call, error: .noSpace))
                let image = try Image.open(faulty)
                try? image.resize(to: byteCount, shrinking: true)
                let size = Int(image.size)
                let last = size / 512 - 1
                try? image.flush()
                guard faulty.failed else { break }
                try image.write(
                    SectorPattern.bytes(sectors: last..<last + 1, value: 100), at: last * 512)
                try image.flush()
                let found = try device.bytes.withUnsafeBytes { try CrashFinding(in: $0, layout) }
                try #require(found.disk.count == size / 512, "write \(call) of a resize")
                #expect(found.disk[last] == 100)
                try image.close()
            }
        }
    }
}
