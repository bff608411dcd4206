import Glibc
import QCOW2
import TestSupport
import Testing

/// Traps 69 to 75: the file below the image, and what else holds it.
@Suite("Traps of the host")
struct MiscTraps {
    private func image(at path: String) throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 12)
        for cluster in 0..<256 { builder.fill(UInt8(cluster & 0x7F + 1), guestCluster: cluster) }
        let file = try TestFile(path, O_RDWR | O_CREAT | O_TRUNC)
        try file.write(builder.build(), at: 0)
    }

    @Test("Trap 69: a punched hole frees its space and leaves the file's length alone")
    func punches() throws {
        let folder = try TemporaryDirectory()
        let path = try folder.write([UInt8](repeating: 7, count: 1.MiB), to: "file")
        let device = try FileDevice(path: path, access: .readWrite)
        defer { device.close() }
        let before = try device.allocatedByteCount()
        try device.punchHole(UInt64(256.KiB)..<UInt64(512.KiB))
        #expect(try device.allocatedByteCount() == before - UInt64(256.KiB))
        // Across the end, and behind it.
        try device.punchHole(UInt64(1.MiB - 4096)..<UInt64(2.MiB))
        try device.punchHole(UInt64(3.MiB)..<UInt64(4.MiB))
        #expect(try device.byteCount() == UInt64(1.MiB))
        let bytes = try TestFile(path, O_RDONLY).read(0..<1.MiB)
        #expect(bytes[..<256.KiB].allSatisfy { $0 == 7 })
        #expect(bytes[256.KiB..<512.KiB].allSatisfy { $0 == 0 })
        #expect(bytes[512.KiB..<1.MiB - 4096].allSatisfy { $0 == 7 })
        #expect(bytes[(1.MiB - 4096)...].allSatisfy { $0 == 0 })
    }

    @Test("Trap 69: a discard gives the space of its clusters back, zeros that keep it do not")
    func frees() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try image(at: path)
        let before = try TestFile(path, O_RDONLY).status()
        let image = try Image.open(path)
        try image.writeZeroes(0..<UInt64(256.KiB), keepingSpace: true)
        try image.flush()
        #expect(try TestFile(path, O_RDONLY).status().st_blocks == before.st_blocks)
        try image.discard(0..<UInt64(512.KiB))
        try image.flush()
        let after = try TestFile(path, O_RDONLY).status()
        #expect(after.st_blocks <= before.st_blocks - 512.KiB / 512)
        #expect(after.st_size == before.st_size)
        #expect(try reads(image, 0..<512.KiB, 0))
        #expect(try reads(image, 255 << 12..<1.MiB, 0x80))
        try image.close()
    }

    @Test("Trap 69: where holes cannot be punched a discard still zeroes, and space is reused")
    func cannotPunch() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 12)
        for cluster in 0..<128 { builder.fill(0x77, guestCluster: cluster) }
        let device = RecordingDevice(builder.build(), yielding: false)
        let fault = FaultyDevice.Fault(.punch, call: 0, error: .notSupported, lasts: true)
        let faulty = FaultyDevice(device, fault)
        let image = try Image.open(faulty)
        let length = device.bytes.count
        for _ in 0..<10 {
            try image.discard(0..<UInt64(512.KiB))
            try image.flush()
            #expect(try reads(image, 0..<512.KiB, 0))
            // One byte each: around it is what was there before, were it not written over.
            for cluster in 0..<128 { try image.write([1], at: cluster * 4096 + 100) }
            #expect(try image.bytes(0..<101) == [UInt8](repeating: 0, count: 100) + [1])
            #expect(try reads(image, 101..<4096, 0))
        }
        try image.close()
        #expect(faulty.failed)
        #expect(device.bytes.count <= length + 64.KiB)
        try expectSound(device)
    }

    @Test(
        "Trap 70: what cannot be written when an image is closed is told by closing it",
        arguments: [FaultyDevice.Kind.write, .flush], [false, true])
    func failingClose(_ kind: FaultyDevice.Kind, lasts: Bool) throws {
        func use(_ device: any BlockDevice) throws -> Image {
            let image = try Image.open(device)
            for cluster in 0..<20 { try image.write([1], at: cluster * 4096) }
            try image.flush()
            for cluster in 20..<40 { try image.write([2], at: cluster * 4096) }
            return image
        }
        func calls(_ device: RecordingDevice) -> Int {
            device.moments.count {
                switch $0 {
                case .write: kind == .write
                case .flushed: kind == .flush
                default: false
                }
            }
        }
        let bytes = ImageBuilder(byteCount: 1.MiB, clusterBits: 12).build()
        let calm = RecordingDevice(bytes, yielding: false)
        let opened = try use(calm)
        let before = calls(calm)
        try opened.close()
        let during = calls(calm) - before
        #expect(during > 1, "closing has nothing to do")
        for call in 0..<during {
            let device = RecordingDevice(bytes, yielding: false)
            let fault = FaultyDevice.Fault(kind, call: before + call, lasts: lasts)
            let image = try use(FaultyDevice(device, fault))
            #expect(throws: ImageError.self, "\(kind) \(call) of closing") { try image.close() }
            try device.bytes.withUnsafeBytes { bytes in
                let reader = try ReferenceReader(bytes)
                #expect(reader.audit().faults == [])
                #expect(try reader.read(0..<4096).first == 1)
            }
        }
    }

    /// The bytes from 100 to 103 and 200 to 203 that somebody else than a new opener has locked.
    private func lockedBytes(_ path: String) throws -> [Int] {
        let probe = try TestFile(path, O_RDWR)
        return try (Array(100...103) + Array(200...203)).filter { byte in
            var lock = flock()
            lock.l_type = Int16(F_WRLCK)
            lock.l_whence = Int16(SEEK_SET)
            lock.l_start = off_t(byte)
            lock.l_len = 1
            guard fcntl(probe.descriptor, F_OFD_GETLK, &lock) == 0 else {
                throw Command.Failure(description: "F_OFD_GETLK failed with \(errno)")
            }
            return lock.l_type != Int16(F_UNLCK)
        }
    }

    @Test("Trap 74: the locks stay when another descriptor of the same file is closed")
    func locksStay() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try image(at: path)
        for (options, bytes) in [
            (OpenOptions(), [100, 101, 103, 201, 203]), (.readOnly, [100, 201, 203]),
        ] {
            let image = try Image.open(path, options: options)
            #expect(try lockedBytes(path) == bytes)
            // Each of these opens and closes the file in this process.
            _ = try TestFile(path, O_RDWR).read(0..<4096)
            _ = try? ImageInfo(path: path)
            _ = try? ImageCheck(path: path, locking: .forceShare)
            _ = try? Image.open(
                path, options: options.access == .readOnly ? OpenOptions() : .readOnly)
            #expect(try lockedBytes(path) == bytes)
            if options.access == .readWrite { try image.write([1], at: 0) }
            try image.flush()
            #expect(try lockedBytes(path) == bytes)
            try image.close()
            #expect(try lockedBytes(path) == [])
        }
    }

    @Test(
        "Trap 74: QEMU is kept out after other descriptors were closed",
        .needsQemuImg)
    func keepsQEMUOut() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try image(at: path)
        let image = try Image.open(path)
        _ = try TestFile(path, O_RDWR).read(0..<4096)
        for flags in [[], ["-r"]] {
            let words = ["qemu-io", "-f", "qcow2"] + flags + ["-c", "read -q 0 512", path]
            #expect(try Command.run(words).status != 0)
        }
        try image.close()
        try QemuImg.io(path, ["read -q 0 512"])
    }

    @Test("Trap 75: clusters in use stay where they are, whatever is freed around them")
    func clustersStay() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 12)
        for cluster in 0..<256 { builder.fill(UInt8(cluster & 0x7F + 1), guestCluster: cluster) }
        let device = RecordingDevice(builder.build(), yielding: false)
        func places() throws -> [UInt64] {
            try device.bytes.withUnsafeBytes { bytes in
                let reader = try ReferenceReader(bytes)
                return try stride(from: 1, to: 256, by: 16).map {
                    try reader.rawEntry(forGuestCluster: $0, in: reader.active)
                }
            }
        }
        let before = try places()
        let image = try Image.open(device)
        // All but a few clusters at the end of the file go: there would be much to move.
        for cluster in 0..<256 where cluster % 16 != 1 {
            let start = UInt64(cluster) << 12
            try image.discard(start..<start + 4096)
            if cluster % 16 == 0 { try image.write([9], at: (cluster + 1) << 12) }
            if cluster % 32 == 0 { try image.flush() }
        }
        try image.flush()
        #expect(try places() == before)
        try image.resize(to: UInt64(2.MiB))
        try image.close()
        #expect(try places() == before)
        try expectSound(device)
    }
}
