import QCOW2
import TestSupport
import Testing

/// Whatever call to the device fails, the image stays whole and the failure is told.
@Suite("Device faults", .serialized)
struct FaultTests {
    static func builder() -> ImageBuilder {
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 9, refcountOrder: 5)
        for cluster in stride(from: 0, to: 128, by: 3) {
            builder.write(
                SectorPattern.bytes(sectors: cluster..<cluster + 1, value: 1), guestCluster: cluster
            )
        }
        builder.snapshot("kept")
        return builder
    }

    /// A run of writes, discards and flushes; the first error ends it.
    static func use(_ image: Image) throws {
        var random = RepeatableRandom(seed: 5)
        for step in 0..<60 {
            let start = random.number(below: 500)
            let sectors = start..<start + 1 + random.number(below: 8)
            switch step % 6 {
            case 5: try image.flush()
            case 4:
                try image.discard(
                    UInt64(sectors.lowerBound * 512)..<UInt64(sectors.upperBound * 512))
            default:
                try image.write(
                    SectorPattern.bytes(sectors: sectors, value: UInt64(step) + 2),
                    at: sectors.lowerBound * 512)
            }
        }
    }

    @Test(
        "Whatever call fails, the image keeps its invariants and its snapshot",
        arguments: [
            (FaultyDevice.Kind.write, SystemError.inputOutput), (.write, .noSpace),
            (.read, .inputOutput), (.flush, .inputOutput), (.punch, .inputOutput),
        ], [false, true])
    func everyCall(_ failure: (FaultyDevice.Kind, SystemError), lasts: Bool) throws {
        var call = 0
        var hasFailed = true
        while hasFailed && call < 400 {
            let device = RecordingDevice(Self.builder().build(), yielding: false)
            let fault = FaultyDevice.Fault(
                failure.0, call: call, error: failure.1, lasts: lasts,
                storing: call % 2 == 0 ? 0 : 256)
            let faulty = FaultyDevice(device, fault)
            var told: (any Error)?
            do {
                let image = try Image.open(faulty)
                do { try Self.use(image) } catch { told = error }
                do { try image.close() } catch { told = told ?? error }
            } catch { told = error }
            hasFailed = faulty.failed
            if hasFailed && failure.0 == .flush {
                try #require(told != nil, "a failed sync (\(call)) was told to nobody")
            }
            try judge(device, "\(failure.0) \(call) with \(failure.1), lasts: \(lasts)")
            call += call < 60 ? 1 : 7
        }
    }

    private func judge(_ device: RecordingDevice, _ what: String) throws {
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            // The first breach is enough: the calls after it would tell the same.
            try #require(reader.audit().faults == [], "\(what)")
            let snapshot = try #require(try reader.snapshots().entries.first)
            for cluster in stride(from: 0, to: 128, by: 3) {
                let kept = try reader.read(
                    cluster * 512..<(cluster + 1) * 512, through: snapshot.table)
                let value = kept.withUnsafeBytes { SectorPattern.value(of: $0, sector: cluster) }
                try #require(value == 1, "\(what): sector \(cluster) of the snapshot")
            }
        }
    }

    @Test("Trap 73: after a failed sync the image takes no writes, and every later flush fails")
    func failedSyncIsFinal() throws {
        let device = RecordingDevice(Self.builder().build(), yielding: false)
        let image = try Image.open(device)
        try image.write([1], at: 0)
        try image.close()
        let syncs = device.syncCount
        let faulty = FaultyDevice(
            RecordingDevice(Self.builder().build(), yielding: false),
            FaultyDevice.Fault(.flush, call: max(1, syncs - 2)))
        let second = try Image.open(faulty)
        var failures = 0
        for step in 0..<10 {
            do {
                try second.write([UInt8](repeating: 1, count: 2048), at: step * 4096)
                try second.flush()
                if failures > 0 { Issue.record("step \(step) succeeded after a failed sync") }
            } catch { failures += 1 }
        }
        #expect(failures > 0)
        #expect(throws: ImageError.self) { try second.close() }
    }
}
