import QCOW2
import TestSupport
import Testing

/// Devices that a library's user puts together, and what an image tells of its space.
@Suite("Devices and space")
struct DeviceTests {
    private func bytes(_ device: any BlockDevice, _ range: Range<Int>) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xDB, count: range.count)
        let count = try bytes.withUnsafeMutableBytes {
            try device.read(into: $0, at: UInt64(range.lowerBound))
        }
        return Array(bytes[..<count])
    }

    private func write(_ bytes: [UInt8], to device: any BlockDevice, at offset: UInt64) throws {
        try bytes.withUnsafeBytes { try device.write($0, at: offset) }
    }

    @Test("A padded device reads zeros behind the end of the one below, and ends itself")
    func padding() throws {
        let base = RAMDisk(byteCount: 1000)
        try write([UInt8](repeating: 5, count: 1000), to: base, at: 0)
        let padded = PaddedDevice(base, byteCount: 4096)
        #expect(try padded.byteCount() == 4096)
        #expect(try bytes(padded, 998..<1002) == [5, 5, 0, 0])
        #expect(try bytes(padded, 4000..<5000) == [UInt8](repeating: 0, count: 96))
        #expect(try bytes(padded, 4096..<4100) == [])
        #expect(try padded.nextHole(from: 2000) == 2000 && padded.nextData(from: 2000) == nil)
        try write([7, 8], to: padded, at: 2000)
        #expect(try bytes(padded, 1999..<2003) == [0, 7, 8, 0])
        #expect(try base.byteCount() == 2002 && padded.byteCount() == 4096)
        try padded.punchHole(0..<4096)
        #expect(try bytes(padded, 0..<4096).allSatisfy { $0 == 0 })
        #expect(throws: SystemError.notSupported) { try padded.resize(to: 1) }
        #expect(try PaddedDevice(RAMDisk(byteCount: 9), byteCount: 4).byteCount() == 9)
    }

    @Test("An image lies on a padded device over a file that was cut short")
    func imageOnPadding() throws {
        var image = ImageBuilder(byteCount: 1.MiB)
        let host = image.fill(6, guestCluster: 3)
        let whole = image.build()
        let base = RecordingDevice(Array(whole[..<(host + 100)]), yielding: false)
        let disk = try Image.open(
            PaddedDevice(base, byteCount: UInt64(whole.count)), options: .readOnly)
        let found = try disk.bytes(3 * 65536..<3 * 65536 + 102)
        #expect(found == [UInt8](repeating: 6, count: 100) + [0, 0])
        try disk.close()
    }

    @Test("A disk is copied between any two devices without its holes, and can be stopped")
    func sparseCopy() throws {
        let source = RAMDisk(byteCount: 1 << 40)
        try write([UInt8](repeating: 9, count: 3 << 20), to: source, at: 1 << 39)
        let target = RAMDisk()
        var parts: [Double] = []
        var copy = Conversion(to: .raw)
        // The end is told by whoever gets there.
        copy.threadCount = 1
        try copy.run(from: SourceDisk(source), to: target) {
            parts.append($0)
            return true
        }
        #expect(parts.last == 1 && parts == parts.sorted())
        #expect(try target.byteCount() == 1 << 40 && target.nextData(from: 0) == 1 << 39)
        #expect(
            try Comparison.compare(SourceDisk(source), SourceDisk(target), isStrict: true)
                == .equal)
        let error = #expect(throws: ImageError.self) {
            try Conversion(to: .raw).run(from: SourceDisk(source), to: RAMDisk()) { _ in false }
        }
        #expect(error?.kind == .cancelled)
    }

    @Test("The space of an image is told cluster by cluster, open for writing or not")
    func usage() throws {
        let device = RAMDisk()
        try Image.create(on: device, size: 8 << 20)
        let image = try Image.open(device)
        try image.write([UInt8](repeating: 1, count: 1 << 20), at: 0)
        try image.createSnapshot("kept")
        try image.write([UInt8](repeating: 2, count: 1 << 19), at: 0)
        try image.deleteSnapshot("kept")
        try image.createSnapshot("again")
        try image.flush()
        let open = try image.spaceUsage()
        try image.close()
        let closed = try Image.open(device, options: .readOnly)
        let usage = try closed.spaceUsage()
        try closed.close()
        #expect(usage.fileByteCount == (try device.byteCount()) && usage.clusterByteCount == 65536)
        // The data and its L2 table.
        #expect(usage.sharedClusterCount == 17 && open.sharedClusterCount == 17)
        #expect(usage.freeClusterCount >= 8)
        #expect(
            (usage.usedClusterCount + usage.freeClusterCount) * 65536 >= usage.fileByteCount)
        try Image.compact(on: device)
        let compacted = try Image.open(device, options: .readOnly)
        #expect(try compacted.spaceUsage().usedClusterCount == usage.usedClusterCount)
        #expect(try compacted.spaceUsage().freeClusterCount == 0)
        try compacted.close()
    }

    @Test("A test says where the next cluster goes, and a compaction brings it back")
    func nextCluster() throws {
        let device = RAMDisk()
        try Image.create(on: device, size: 8 << 20)
        let image = try Image.open(device)
        image.nextCluster = 1000
        try image.write([UInt8](repeating: 1, count: 65536), at: 0)
        #expect(image.nextCluster == 1002)
        try image.close()
        #expect(try device.byteCount() == 1002 << 16)
        try Image.compact(on: device)
        #expect(try device.byteCount() < 8 << 16)
        let again = try Image.open(device, options: .readOnly)
        #expect(again.nextCluster == nil)
        #expect(try again.bytes(0..<65536).allSatisfy { $0 == 1 })
        try again.close()
    }

    @Test("A table under which other things lie is found")
    func overlaps() throws {
        var image = ImageBuilder(byteCount: 1.MiB, clusterBits: 12)
        image.fill(1, guestCluster: 0)
        let fine = RecordingDevice(image.build(), yielding: false)
        #expect(try ImageCheck.overlaps(on: fine) == [])
        let entry = image.entryOffset(5)
        let table = entry / 4096 * 4096
        image.put(UInt64(table), at: entry)
        let broken = RecordingDevice(image.build(), yielding: false)
        #expect(try ImageCheck.overlaps(on: broken) == [UInt64(table)])
        #expect(throws: ImageError.self) { try Image.compact(on: broken) }
        #expect(broken.moments.allSatisfy { if case .write = $0 { false } else { true } })
    }
}
