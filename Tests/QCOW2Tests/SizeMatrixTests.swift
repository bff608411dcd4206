import Glibc
import QCOW2
import TestSupport
import Testing

/// Disks from a kibibyte to a pebibyte, and ranges at every border that a disk has.
@Suite("Size matrix", .needsQemuImg)
struct SizeMatrixTests {
    private static let pebibyte: UInt64 = 1 << 50
    private static let cluster: UInt64 = 65536
    /// Guest bytes of an L2 table, and of a cluster of the L1 table.
    private static let tableSpan = cluster * 8192
    private static let l1Span = tableSpan * 8192

    let folder: TemporaryDirectory
    let path: String

    init() throws {
        folder = try TemporaryDirectory()
        path = folder.file("disk.qcow2")
    }

    /// Ranges of a sector, a page and a cluster that begin at, just before and just behind each
    /// border, and those that end with the disk.
    private static let ranges: [Range<UInt64>] = {
        let lengths: [UInt64] = [512, 4096, cluster]
        let borders: [UInt64] = [0, cluster, tableSpan, l1Span]
        var ranges: [Range<UInt64>] = []
        for length in lengths {
            for border in borders {
                for step in -2...2 where border != 0 || step >= 0 {
                    let start = UInt64(Int64(border) + Int64(step) * 512)
                    ranges.append(start..<start + length)
                }
            }
            for step in 0...2 as ClosedRange<UInt64> {
                let end = pebibyte - step * 512
                ranges.append(end - length..<end)
            }
        }
        return ranges
    }()

    private func clusters(of range: Range<UInt64>) -> Range<UInt64> {
        let start = range.lowerBound / Self.cluster * Self.cluster
        return start..<(range.upperBound + Self.cluster - 1) / Self.cluster * Self.cluster
    }

    private func dataRanges(of image: Image) throws -> [Range<UInt64>] {
        var ranges: [Range<UInt64>] = []
        try image.forEachMappedExtent(in: 0..<image.size) { extent in
            guard extent.isData else { return }
            let range = extent.start..<extent.start + extent.byteCount
            if let last = ranges.last, last.upperBound == range.lowerBound {
                ranges[ranges.count - 1] = last.lowerBound..<range.upperBound
            } else {
                ranges.append(range)
            }
        }
        return ranges
    }

    @Test("What is written at any border of 1 PiB is read there, mapped there, and discarded")
    func everyRange() throws {
        try Image.create(at: path, size: Self.pebibyte)
        for (number, range) in Self.ranges.enumerated() {
            let bytes = [UInt8](repeating: UInt8(number % 255 + 1), count: range.count)
            let image = try Image.open(path)
            try image.write(bytes, at: Int(range.lowerBound))
            let around = clusters(of: range).clamped(to: 0..<Self.pebibyte)
            var expected = [UInt8](repeating: 0, count: around.count)
            expected.put(bytes, at: Int(range.lowerBound - around.lowerBound))
            #expect(try image.bytes(Int(around.lowerBound)..<Int(around.upperBound)) == expected)
            #expect(try dataRanges(of: image) == [around], "\(range)")
            if number % 8 == 0 {
                try image.close()
                #expect(try ImageCheck(path: path).corruptionCount == 0)
                let again = try Image.open(path)
                #expect(
                    try again.bytes(Int(range.lowerBound)..<Int(range.upperBound)) == bytes)
                try again.discard(around)
                try again.close()
            } else {
                try image.discard(around)
                #expect(
                    try image.bytes(Int(range.lowerBound)..<Int(range.upperBound))
                        .allSatisfy { $0 == 0 })
                #expect(try dataRanges(of: image) == [])
                try image.close()
            }
        }
        #expect(try QemuImg.check(path).status == 0)
        try Image.compact(path)
        #expect(try QemuImg.check(path).status == 0)
        #expect(try TestFile(path, O_RDONLY).byteCount() < 18.MiB)
    }

    @Test(
        "Disks of 1 KiB, 1 MiB and 1 PiB are made, and QEMU finds them so",
        arguments: [1 << 10, 1 << 20, 1 << 50] as [UInt64])
    func creation(size: UInt64) throws {
        try Image.create(at: path, size: size)
        #expect(try QemuImg.info(path).byteCount == Int(size))
        #expect(try QemuImg.check(path).status == 0)
        let image = try Image.open(path)
        #expect(image.size == size)
        #expect(try image.seekData(from: 0) == nil)
        try image.write([7], at: Int(size) - 1)
        try image.close()
        #expect(try QemuImg.check(path).status == 0)
    }

    @Test(
        "A disk that was made larger or smaller is one of that size",
        arguments: [1 << 20, 1 << 30, 1 << 40] as [UInt64],
        [1 << 20, 1 << 30, 1 << 40] as [UInt64])
    func resizing(from old: UInt64, to new: UInt64) throws {
        let other = folder.file("other.qcow2")
        try Image.create(at: path, size: old)
        try Image.create(at: other, size: new)
        let common = Int(min(old, new))
        for (place, size) in [(path, old), (other, new)] {
            let image = try Image.open(place)
            try image.write([UInt8](repeating: 3, count: 70_000), at: 100)
            try image.write([UInt8](repeating: 4, count: 512), at: common - 512)
            if size > new { try image.write([UInt8](repeating: 5, count: 99), at: common + 1) }
            if place == path { try image.resize(to: new, shrinking: true) }
            try image.close()
        }
        let outcome = try Comparison.compare(
            SourceDisk(path: path), SourceDisk(path: other), isStrict: true)
        #expect(outcome == .equal)
        #expect(try QemuImg.check(path).status == 0)
        #expect(try QemuImg.info(path).byteCount == Int(new))
    }

    @Test(
        "raw, qcow2 and raw again hold the same, whatever the length",
        arguments: [
            0, 1, 511, 513, 65535, 65537, 1 << 20, 3 << 20 | 12345, 1 << 42,
        ] as [UInt64], [true, false])
    func thereAndBack(byteCount: UInt64, isZero: Bool) throws {
        let raw = RAMDisk(byteCount: byteCount)
        if !isZero {
            for start in [0, byteCount / 3, byteCount / 2, byteCount - min(byteCount, 700)] {
                let count = min(600, byteCount - start)
                let bytes = [UInt8](repeating: UInt8(start % 251 + 1), count: Int(count))
                try bytes.withUnsafeBytes { try raw.write($0, at: start) }
            }
        }
        let (image, back) = (RAMDisk(), RAMDisk())
        try Conversion(to: .qcow2(CreateOptions())).run(from: SourceDisk(raw), to: image)
        let disk = try Image.open(image, options: .readOnly)
        // A disk has whole sectors.
        #expect(disk.size == (byteCount + 511) / 512 * 512)
        if isZero { #expect(try disk.seekData(from: 0) == nil) }
        try Conversion(to: .raw).run(from: SourceDisk(disk), to: back)
        try disk.close()
        let padded = PaddedDevice(raw, byteCount: (byteCount + 511) / 512 * 512)
        let outcome = try Comparison.compare(
            SourceDisk(padded), SourceDisk(back), isStrict: true)
        #expect(outcome == .equal)
        #expect(try ImageCheck(image).corruptionCount == 0 && ImageCheck(image).leakCount == 0)
    }
}
