import QCOW2
import TestSupport
import Testing

/// The check of extended L2 entries, beside qemu-img's.
@Suite("Checking subclusters")
struct SubclusterCheckTests {
    private func check(_ bytes: [UInt8]) throws -> (ImageCheck, [CheckFinding]) {
        var findings: [CheckFinding] = []
        let device = RecordingDevice(bytes, yielding: false)
        let check = try ImageCheck(device) { findings.append($0) }
        return (check, findings)
    }

    /// What qemu-img counts as corrupt.
    private func corruptionCount(_ bytes: [UInt8]) throws -> Int {
        let folder = try TemporaryDirectory()
        let result = try QemuImg.check(try folder.write(bytes, to: "disk.qcow2"))
        return result.errors.split(separator: "\n").count { $0.hasPrefix("ERROR") }
            + result.output.split(separator: "\n").count { $0.hasPrefix("ERROR") }
    }

    private func image() -> ImageBuilder {
        var builder = ImageBuilder(byteCount: 1.MiB, isExtended: true)
        builder.fill(0x11, guestCluster: 0)
        builder.setBitmap(0b10 << 32 | 0b1101, guestCluster: 0)
        builder.fill(0x22, guestCluster: 1)
        builder.setBitmap(0, guestCluster: 1)
        builder.setBitmap(~0 << 32, guestCluster: 2)
        builder.compress([UInt8](repeating: 1, count: 65536), guestCluster: 3)
        return builder
    }

    @Test("A sound image has no findings, and its figures")
    func clean() throws {
        let (check, findings) = try check(image().build())
        #expect(findings.isEmpty)
        #expect(check.allocatedClusterCount == 3 && check.compressedClusterCount == 1)
        #expect(try corruptionCount(image().build()) == 0)
    }

    @Test("Every entry that contradicts itself is a corruption, for qemu-img too")
    func contradictions() throws {
        var builder = image()
        builder.setBitmap(1 << 63 | 1 << 31, guestCluster: 1)
        builder.setBitmap(1 << 40 | 1, guestCluster: 3)
        builder.setBitmap(1 << 7, guestCluster: 4)
        // Bit 0 of the first word says nothing.
        builder.setEntry(1, guestCluster: 5)
        let bytes = builder.build()
        let (check, findings) = try check(bytes)
        #expect(check.corruptionCount == 3 && check.leakCount == 0)
        #expect(
            findings.contains {
                if case .subclustersClash(_, 1 << 63 | 1 << 31) = $0 { true } else { false }
            })
        #expect(
            findings.contains {
                if case .compressedWithBitmap(_, 1 << 40 | 1) = $0 { true } else { false }
            })
        #expect(findings.contains(.subclustersWithoutCluster(bitmap: 1 << 7)))
        #expect(findings.allSatisfy { !$0.description.contains("\n") })
        #expect(try corruptionCount(bytes) == 3)
    }

    @Test("A wrong COPIED flag, a low count and a leak are found")
    func counts() throws {
        var builder = image()
        let host = builder.fill(0x33, guestCluster: 6)
        builder.setEntry(UInt64(host), guestCluster: 6)
        let lost = builder.allocate(byteCount: 65536)
        let twice = builder.fill(0x44, guestCluster: 7)
        builder.setEntry(UInt64(twice) | 1 << 63, guestCluster: 8)
        builder.setBitmap(1, guestCluster: 8)
        let (check, findings) = try check(builder.build())
        #expect(check.corruptionCount == 2 && check.leakCount == 1)
        #expect(findings.contains(.clusterCopied(entry: UInt64(host), stored: 1)))
        #expect(findings.contains(.leak(cluster: UInt64(lost >> 16), stored: 1, found: 0)))
        #expect(findings.contains(.countTooLow(cluster: UInt64(twice >> 16), stored: 1, found: 2)))
    }

    @Test("An image that was not closed gets its counts rebuilt, bitmaps untouched")
    func rebuilds() throws {
        var builder = image()
        builder.incompatibleFeatures |= 1
        builder.snapshot("kept")
        builder.count(builder.entryOffset(0)..<builder.entryOffset(0) + 1, by: 5)
        let device = RecordingDevice(builder.build(), yielding: false)
        let opened = try Image.open(device)
        #expect(try opened.bytes(0..<2048).allSatisfy { $0 == 0x11 })
        try opened.close()
        let (check, findings) = try check(device.bytes)
        #expect(findings.isEmpty && check.corruptionCount == 0)
        try device.bytes.withUnsafeBytes {
            let reader = try ReferenceReader($0)
            #expect(reader.incompatibleFeatures == 16)
            #expect(
                try reader.bitmap(forGuestCluster: 0, in: reader.active) == 0b10 << 32 | 0b1101)
            #expect(try reader.bitmap(forGuestCluster: 2, in: reader.active) == ~0 << 32)
        }
    }
}
