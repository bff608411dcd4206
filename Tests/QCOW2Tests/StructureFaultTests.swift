import QCOW2
import TestSupport
import Testing

/// Whatever call fails while the structure of an image changes, no count is too low.
@Suite("Faults while the structure changes", .serialized)
struct StructureFaultTests {
    enum Change: String, CaseIterable { case create, apply, delete, grow, shrink }

    private static let size = 128.KiB

    private static func builder() -> ImageBuilder {
        var builder = ImageBuilder(byteCount: size, clusterBits: 9)
        for cluster in stride(from: 0, to: 256, by: 5) { builder.fill(0x11, guestCluster: cluster) }
        builder.snapshot("kept")
        for cluster in stride(from: 0, to: 256, by: 9) { builder.fill(0x22, guestCluster: cluster) }
        return builder
    }

    /// What the disk holds before and after the change, and what the snapshot holds.
    private static func content(_ step: (Int) -> UInt8) -> [UInt8] {
        (0..<256).flatMap { [UInt8](repeating: step($0), count: 512) }
    }

    private static let kept = content { $0 % 5 == 0 ? 0x11 : 0 }
    private static let active = content { cluster in
        if cluster % 50 == 3 { return 0x33 }
        return cluster % 9 == 0 ? 0x22 : cluster % 5 == 0 ? 0x11 : 0
    }

    private static func change(_ image: Image, _ change: Change) throws {
        // Not committed when the change begins.
        for cluster in stride(from: 3, to: 256, by: 50) {
            try image.write([UInt8](repeating: 0x33, count: 512), at: cluster * 512)
        }
        switch change {
        case .create: try image.createSnapshot("new")
        case .apply: try image.applySnapshot("kept")
        case .delete: try image.deleteSnapshot("kept")
        case .grow: try image.resize(to: 16 << 20)
        case .shrink: try image.resize(to: 40 << 10, shrinking: true)
        }
    }

    @Test(
        "Trap 40: a change of structure that fails halfway leaves every count high enough",
        arguments: Change.allCases,
        [
            (FaultyDevice.Kind.write, SystemError.noSpace), (.write, .inputOutput),
            (.read, .inputOutput), (.flush, .inputOutput), (.resize, .inputOutput),
        ])
    func failsHalfway(_ change: Change, fault: (FaultyDevice.Kind, SystemError)) throws {
        let bytes = Self.builder().build()
        for lasts in [false, true] {
            var call = 0
            while true {
                let device = RecordingDevice(bytes, yielding: false)
                let faulty = FaultyDevice(
                    device,
                    FaultyDevice.Fault(
                        fault.0, call: call, error: fault.1, lasts: lasts,
                        storing: call % 2 == 0 ? 0 : 256))
                var isTold = false
                do {
                    let image = try Image.open(faulty)
                    do { try Self.change(image, change) } catch { isTold = true }
                    do { try image.close() } catch { isTold = true }
                } catch { isTold = true }
                guard faulty.failed else { break }
                let words = "\(change), \(fault.0) \(call), lasts: \(lasts), told: \(isTold)"
                try judge(device, change, isTold: isTold, words)
                call += TestEnvironment.isLong || call < 10 ? 1 : 7
            }
            #expect(call > 2 || fault.0 == .resize, "only \(call) calls of \(fault.0)")
        }
    }

    private func judge(
        _ device: RecordingDevice, _ change: Change, isTold: Bool, _ words: String
    ) throws {
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            try #require(reader.audit().faults == [], "\(words)")
            for snapshot in try reader.snapshots().entries where snapshot.name == "kept" {
                let found = try reader.read(0..<Self.size, through: snapshot.table)
                try #require(found == Self.kept, "\(words): the snapshot has changed")
            }
            let end = min(reader.byteCount, Self.size)
            let found = try reader.read(0..<end)
            // Where somebody was told of a failure, what was not flushed may be missing.
            for sector in 0..<end / 512 {
                let byte = found[sector * 512]
                let wanted = [Self.active[sector * 512], Self.kept[sector * 512]]
                let before: UInt8 = sector % 9 == 0 ? 0x22 : wanted[1]
                try #require(
                    byte == wanted[change == .apply && reader.byteCount == Self.size ? 1 : 0]
                        || isTold && (wanted.contains(byte) || byte == before),
                    "\(words): sector \(sector) holds \(byte)")
            }
            if reader.byteCount > Self.size {
                try #require(try reader.read(Self.size..<reader.byteCount).allSatisfy { $0 == 0 })
            }
        }
    }
}
