import QCOW2
import TestSupport
import Testing

/// L2 tables that a snapshot shares, or seems to share.
@Suite("Tables shared by snapshots")
struct SharedTableTests {
    @Test(
        "A table whose count a cut left too high is copied before it is changed",
        arguments: [2, 3] as [UInt32])
    func countTooHigh(version: UInt32) throws {
        var builder = ImageBuilder(byteCount: 64.KiB, version: version, clusterBits: 12)
        for cluster in 0..<8 { builder.fill(UInt8(cluster + 1), guestCluster: cluster) }
        let table = builder.entryOffset(0)
        builder.count(table..<table + 1, by: 1)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        try image.write([UInt8](repeating: 0xAA, count: 4096), at: 8192)
        try image.createSnapshot("new")
        try image.write([UInt8](repeating: 0xBB, count: 4096), at: 4096)
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            #expect(reader.audit().faults == [])
            let disk = try reader.read(0..<64.KiB)
            #expect([disk[0], disk[4096], disk[8192], disk[12288]] == [1, 0xBB, 0xAA, 4])
        }
    }

    @Test("Narrow counts are judged for a snapshot while clients discard", arguments: [3, 4])
    func widthBesideDiscards(refcountOrder: Int) throws {
        for seed in 0..<40 as Range<UInt64> {
            var builder = ImageBuilder(
                byteCount: 192 << 9, clusterBits: 9, refcountOrder: refcountOrder)
            for cluster in 0..<192 { builder.fill(1, guestCluster: cluster) }
            let device = RecordingDevice(builder.build(), seed: seed)
            try takingTurns(seed: seed) {
                let image = try Image.open(device)
                try onThreads(2) { index in
                    if index == 0 {
                        try image.createSnapshot("new")
                        return
                    }
                    for cluster in stride(from: 0, to: 192, by: 8) as StrideTo<UInt64> {
                        try image.discard(cluster << 9..<(cluster + 2) << 9)
                        try image.flush()
                    }
                }
                try image.close()
            }
            try expectSound(device, "seed \(seed)")
        }
    }

    @Test("A table's copy is on the disk before an entry leads there, beside another's commits")
    func copyBeforeEntry() throws {
        for seed in 0..<40 as Range<UInt64> {
            var builder = ImageBuilder(byteCount: 512 << 9, clusterBits: 9)
            for cluster in 0..<512 where cluster % 2 == 0 { builder.fill(1, guestCluster: cluster) }
            builder.snapshot("kept")
            let device = RecordingDevice(builder.build(), seed: seed)
            try takingTurns(seed: seed) {
                let image = try Image.open(device)
                try onThreads(2) { index in
                    for table in 0..<8 {
                        if index == 0 {
                            try image.discard(UInt64(table << 15)..<UInt64(table << 15 + 512))
                        } else {
                            try image.write([2], at: table << 15 + 4096)
                        }
                        try image.flush()
                    }
                }
                try image.close()
            }
            var explorer = CrashExplorer(initial: device.initial, seed: seed)
            for moment in device.moments {
                if case .flushed = moment {
                    let fault = explorer.explore { bytes in
                        do throws(ReferenceReader.Fault) {
                            return try ReferenceReader(bytes).audit().faults.first
                        } catch { return "\(error)" }
                    }
                    try #require(fault == nil, "seed \(seed), state \(explorer.stateCount)")
                }
                explorer.advance(moment)
            }
        }
    }
}
