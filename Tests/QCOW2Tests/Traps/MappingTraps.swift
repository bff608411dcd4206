import Glibc
import QCOW2
import TestSupport
import Testing

/// Traps 21 to 36: what an L2 entry says, and what a guest reads.
@Suite("Traps of mapping and reading")
struct MappingTraps {
    @Test(
        "Trap 21: a zero cluster reads as zeros, whatever lies below it and where it points",
        arguments: [9, 12, 16])
    func zeroFlag(clusterBits: Int) throws {
        let size = 1 << clusterBits
        var builder = ImageBuilder(byteCount: 8 * size, clusterBits: clusterBits)
        // Neighbours in the disk and in the file: one run, but for the flag.
        builder.fill(0x11, guestCluster: 0)
        builder.zeroAllocated(guestCluster: 1)
        builder.zeroAllocated(guestCluster: 2)
        builder.fill(0x33, guestCluster: 3)
        builder.zero(guestCluster: 4)
        builder.zero(guestCluster: 5)
        let image = try Image.open(
            bytes: builder.build(), backing: [rawDisk(0xBB, 8 * size)], options: .readOnly)
        let expected: [UInt8] = [0x11, 0, 0, 0x33, 0, 0, 0xBB, 0xBB]
        let all = try image.bytes(0..<8 * size)
        #expect(expected.indices.allSatisfy { all[$0 * size] == expected[$0] })
        for (cluster, byte) in expected.enumerated() {
            #expect(try reads(image, cluster * size..<(cluster + 1) * size, byte))
            #expect(try reads(image, cluster * size + 100..<cluster * size + 101, byte))
        }
        #expect(try image.seekHole(from: 0) == UInt64(size))
        #expect(try image.seekData(from: UInt64(size)) == UInt64(3 * size))
        #expect(try image.seekData(from: UInt64(4 * size)) == UInt64(6 * size))
        try image.close()
    }

    enum Way: String, CaseIterable { case discard, zero, zeroKeepingSpace }

    @Test(
        "Trap 23: what is zeroed or discarded hides the backing file, allocated or not",
        arguments: Way.allCases, [UInt32(2), 3])
    func hidesBacking(_ way: Way, version: UInt32) throws {
        var builder = ImageBuilder(byteCount: 1.MiB, version: version)
        builder.fill(0x22, guestCluster: 8)
        builder.compress([UInt8](repeating: 0x33, count: 65536), guestCluster: 9)
        let device = RecordingDevice(builder.build(), yielding: false)
        let base = rawDisk(0xBB, 1.MiB)
        var image = try Image.open(device, backing: [base])
        // Whole clusters, parts of two, and to the end of the disk.
        let ranges = [
            128.KiB..<256.KiB, 300_000..<400_000, 8 * 65536..<10 * 65536, 900_096..<1.MiB,
        ]
        for range in ranges {
            let range = UInt64(range.lowerBound)..<UInt64(range.upperBound)
            switch way {
            case .discard: try image.discard(range)
            case .zero: try image.writeZeroes(range)
            case .zeroKeepingSpace: try image.writeZeroes(range, keepingSpace: true)
            }
        }
        for opening in 1...2 {
            for range in ranges { #expect(try reads(image, range, 0), "\(range), \(opening)") }
            for range in [0..<128.KiB, 256.KiB..<300_000, 400_000..<8 * 65536, 655_360..<900_096] {
                #expect(try reads(image, range, 0xBB), "\(range), \(opening)")
            }
            try image.close()
            image = try Image.open(device, backing: [base], options: .readOnly)
        }
        try image.close()
        try expectSound(device)
    }

    @Test("Trap 25: a write to a zero cluster takes the zero flag away", arguments: [512, 4096])
    func flagFalls(byteCount: Int) throws {
        var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
        builder.zeroAllocated(guestCluster: 2)  // shared from here on
        builder.snapshot("kept")
        builder.zero(guestCluster: 0)
        builder.zeroAllocated(guestCluster: 1)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device, backing: [rawDisk(0xBB, 64.KiB)])
        for cluster in 0..<3 {
            let start = cluster << 12
            try image.write([UInt8](repeating: 0x77, count: byteCount), at: start)
            #expect(try reads(image, start..<start + byteCount, 0x77))
        }
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            for cluster in 0..<3 {
                let entry = try reader.rawEntry(forGuestCluster: cluster, in: reader.active)
                #expect(entry & 1 == 0 && entry >> 63 == 1)
                let found = try reader.read(cluster << 12..<(cluster + 1) << 12)
                #expect(found[..<byteCount].allSatisfy { $0 == 0x77 })
                #expect(found[byteCount...].allSatisfy { $0 == 0 })
            }
            let table = try #require(try reader.snapshots().entries.first).table
            #expect(try reader.read(2 << 12..<3 << 12, through: table).allSatisfy { $0 == 0 })
        }
        try expectSound(device)
    }

    @Test("Trap 32: flags and reserved bits are no part of an offset")
    func reservedBits() throws {
        for bits in Array(1...8) + Array(56...61) as [UInt64] {
            var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
            let host = builder.fill(0x11, guestCluster: 0)
            builder.fill(0x22, guestCluster: 1)
            builder.setEntry(1 << 63 | 1 << bits | UInt64(host), guestCluster: 0)
            let l2 = builder.entryOffset(0)
            var bytes = builder.build()
            let slot = builder.l1Offset
            bytes.put(bytes.number(at: slot, as: UInt64.self) | 1 << bits, at: slot)
            let image = try Image.open(bytes: bytes, options: .readOnly)
            #expect(try reads(image, 0..<4096, 0x11), "bit \(bits)")
            #expect(try reads(image, 4096..<8192, 0x22), "bit \(bits)")
            try image.close()
            // A write goes to that very cluster, or is refused; nothing else is touched.
            let device = RecordingDevice(bytes, yielding: false)
            let writer = try Image.open(device)
            let isWritten = (try? writer.write([0x77], at: 0)) != nil
            try? writer.close()
            #expect(device.bytes[host] == (isWritten ? 0x77 : 0x11), "bit \(bits)")
            #expect(device.bytes[host + 1..<host + 8192] == bytes[host + 1..<host + 8192])
            #expect(device.bytes[l2 + 8..<l2 + 4096] == bytes[l2 + 8..<l2 + 4096])
        }
    }

    @Test(
        "Trap 36: what is written beyond 4 TiB is read there, and only there, by QEMU too",
        .needsQemuImg)
    func hugeOffsets() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        let size = 8 << 40
        try QemuImg.create(path, size: size)
        try QemuImg.io(path, ["write -q -P 5 5T 64k"])
        let image = try Image.open(path)
        #expect(try reads(image, 5 << 40..<5 << 40 + 65536, 5))
        #expect(try reads(image, 1 << 40..<1 << 40 + 65536, 0))
        try image.write([UInt8](repeating: 6, count: 512), at: 6 << 40 + 512)
        try image.write([7], at: size - 1)
        try image.discard(5 << 40..<5 << 40 + 4096)
        #expect {
            try image.bytes(size - 1..<size + 1)
        } throws: { ($0 as? ImageError)?.code == EINVAL }
        #expect(try image.seekData(from: 0) == 5 << 40)
        try image.close()
        try QemuImg.io(
            path,
            [
                "read -q -P 0 5T 4k", "read -q -P 5 \(5 << 40 + 4096) 60k", "read -q -P 0 6T 512",
                "read -q -P 6 \(6 << 40 + 512) 512", "read -q -P 0 2T 1M",
                "read -q -P 7 \(size - 1) 1",
            ])
        let check = try QemuImg.check(path)
        #expect(check.status == 0, "\(check)")
    }
}
