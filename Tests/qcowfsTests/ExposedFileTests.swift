import Glibc
import TestSupport
import Testing

/// The rows of the table "What the exposed file does".
@Suite("The exposed file", .serialized, .enabledWhereMountable)
struct ExposedFileTests {
    static let size = 8.MiB

    /// Mounts a fresh image and hands its open file to `body`; the image must be clean after.
    private func onDisk(
        size: Int = size, options: [String] = [], mountOptions: [String] = [],
        flags: Int32 = O_RDWR,
        prepare: (TemporaryDirectory, String) throws -> Void = { folder, path in
            try makeImage(path)
        }, _ body: (TestFile, TestMount) throws -> Void
    ) throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try prepare(folder, image)
        let mount = try TestMount(image, in: folder, options: mountOptions)
        try use(mount, flags, body)
        try mount.unmount()
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
    }

    private func use(
        _ mount: TestMount, _ flags: Int32, _ body: (TestFile, TestMount) throws -> Void
    ) throws { try body(mount.open(flags), mount) }

    private func expectError(
        _ code: Int32, sourceLocation: SourceLocation = #_sourceLocation,
        _ body: () throws -> Void
    ) {
        do {
            try body()
            Issue.record("it succeeded", sourceLocation: sourceLocation)
        } catch let error as CallError {
            #expect(error.code == code, "\(error)", sourceLocation: sourceLocation)
        } catch { Issue.record(error, sourceLocation: sourceLocation) }
    }

    @Test("reads guest bytes, and zeros where nothing was written")
    func reads() throws {
        try onDisk { (file, _) throws in
            #expect(try holds(file, 0..<128.KiB, 0xA1))
            #expect(try holds(file, 128.KiB..<1.MiB, 0))
            #expect(try holds(file, 1.MiB..<1.MiB + 64.KiB, 0xA2))
            #expect(try file.read(Self.size - 10..<Self.size + 10).count == 10)
        }
    }

    @Test("takes what fits of a write across the end, then ENOSPC")
    func writesAtTheEnd() throws {
        try onDisk { (file, _) throws in
            let bytes = [UInt8](repeating: 0x77, count: 8192)
            try bytes.withUnsafeBytes { buffer throws in
                #expect(try file.writeOnce(buffer, at: Self.size - 4096) == 4096)
                expectError(ENOSPC) { _ = try file.writeOnce(buffer, at: Self.size) }
            }
            #expect(try file.byteCount() == Self.size)
            #expect(try holds(file, Self.size - 4096..<Self.size, 0x77))
        }
    }

    @Test("written back, says ENOSPC of what went past the end at fsync, and has its size by then")
    func writesBackPastTheEnd() throws {
        try onDisk(mountOptions: ["--writeback", "on"]) { (file, _) throws in
            let bytes = [UInt8](repeating: 0x77, count: 200)
            for _ in 0..<20 {
                try file.write(bytes, at: Self.size - 100)
                expectError(ENOSPC) { try file.sync() }
                #expect(try file.byteCount() == Self.size)
            }
        }
    }

    @Test("opens for writing with EROFS on a read-only mount")
    func readOnly() throws {
        try onDisk(mountOptions: ["--read-only"], flags: O_RDONLY) { (file, mount) throws in
            #expect(try holds(file, 0..<4096, 0xA1))
            expectError(EROFS) { _ = try mount.open(O_RDWR) }
            expectError(EROFS) { _ = try mount.open(O_WRONLY) }
            #expect(try file.status().st_mode & 0o777 == 0o400)
        }
    }

    @Test("ignores O_TRUNC and a truncate to 0, so that dd and cp onto it work")
    func truncation() throws {
        try onDisk { (file, mount) throws in
            _ = try mount.open(O_RDWR | O_TRUNC)
            #expect(try file.byteCount() == Self.size)
            try file.truncate(to: 0)
            #expect(try file.byteCount() == Self.size)
            #expect(try holds(file, 0..<4096, 0xA1))
            try Command.require(
                "dd", "if=/dev/zero", "of=\(mount.disk)", "bs=64k", "count=2", "status=none")
            #expect(try file.byteCount() == Self.size)
            #expect(try holds(file, 0..<128.KiB, 0))
            #expect(try holds(file, 1.MiB..<1.MiB + 64.KiB, 0xA2))
        }
    }

    @Test("grows by truncate, the new range reads zero, and the image has grown")
    func grows() throws {
        try onDisk { (file, mount) throws in
            try file.truncate(to: Self.size + 1.MiB)
            #expect(try file.byteCount() == Self.size + 1.MiB)
            #expect(try holds(file, Self.size..<Self.size + 1.MiB, 0))
            try file.write([UInt8](repeating: 9, count: 512), at: Self.size + 1.MiB - 512)
            try file.sync()
        }
    }

    @Test("refuses a size that is no multiple of 512 with EINVAL")
    func oddSize() throws {
        try onDisk { (file, _) throws in
            expectError(EINVAL) { try file.truncate(to: Self.size + 100) }
        }
    }

    @Test("refuses to shrink with EPERM")
    func shrinking() throws {
        try onDisk { (file, _) throws in
            expectError(EPERM) { try file.truncate(to: Self.size / 2) }
            #expect(try file.byteCount() == Self.size)
        }
    }

    @Test("shrinks with -o shrink")
    func shrinksWithOption() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let mount = try TestMount(image, in: folder, options: ["-o", "shrink"])
        try use(mount, O_RDWR) { (file, _) throws in
            try file.truncate(to: 1.MiB)
            #expect(try file.byteCount() == 1.MiB)
            try file.truncate(to: 2.MiB)
            #expect(try holds(file, 1.MiB..<2.MiB, 0))
        }
        try mount.unmount()
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
    }

    @Test("punches: the range reads zero and its whole clusters are holes at once")
    func punches() throws {
        try onDisk { (file, _) throws in
            try file.punch(10_000..<120_000)
            #expect(try holds(file, 0..<10_000, 0xA1))
            #expect(try holds(file, 10_000..<120_000, 0))
            #expect(try holds(file, 120_000..<128.KiB, 0xA1))
            try file.punch(1.MiB..<1.MiB + 64.KiB)
            #expect(try file.nextData(from: 1.MiB) == nil)
        }
    }

    @Test("punches the partial cluster at the end of the disk whole")
    func punchesTheEnd() throws {
        let size = 1.MiB + 1536
        try onDisk(prepare: { _, path in
            try makeImage(path, size: size, commands: ["write -q -P 5 0 \(size)"])
        }) { (file, _) throws in
            try file.punch(1.MiB..<size)
            #expect(try file.nextData(from: 1.MiB) == nil)
            #expect(try holds(file, 1.MiB..<size, 0))
        }
    }

    @Test("a punched range hides the backing file", arguments: [2, 3])
    func punchesOverBacking(version: Int) throws {
        try onDisk(prepare: { folder, path in
            try makeImage(folder.file("base.qcow2"), commands: ["write -q -P 0xB1 0 1M"])
            try QemuImg.create(
                path, options: ["compat=\(version == 2 ? "0.10" : "1.1")"], backing: "base.qcow2")
        }) { (file, _) throws in
            try file.punch(100..<300_000)
            #expect(try holds(file, 0..<100, 0xB1))
            #expect(try holds(file, 100..<300_000, 0))
            #expect(try holds(file, 300_000..<1.MiB, 0xB1))
            if version == 3 { #expect(try file.nextData(from: 64.KiB) == 4 * 64.KiB) }
        }
    }

    @Test("zeroes a range and keeps its space")
    func zeroes() throws {
        try onDisk { (file, mount) throws in
            try file.sync()
            let before = try TestFile(mount.image, O_RDONLY).status().st_blocks
            try file.zero(0..<128.KiB)
            try file.sync()
            #expect(try holds(file, 0..<128.KiB, 0))
            #expect(try TestFile(mount.image, O_RDONLY).status().st_blocks >= before)
        }
    }

    @Test("fallocate gives clusters, and grows the disk without KEEP_SIZE")
    func allocates() throws {
        try onDisk { (file, _) throws in
            try file.allocate(0, 4.MiB..<5.MiB)
            #expect(try holds(file, 4.MiB..<5.MiB, 0))
            try file.allocate(FALLOC_FL_KEEP_SIZE, Self.size - 4096..<Self.size + 1.MiB)
            #expect(try file.byteCount() == Self.size)
            try file.allocate(0, Self.size..<Self.size + 1.MiB)
            #expect(try file.byteCount() == Self.size + 1.MiB)
        }
    }

    @Test("clips punches and zeroes at the end")
    func clips() throws {
        try onDisk { (file, _) throws in
            try file.punch(Self.size - 4096..<Self.size + 1.MiB)
            #expect(try file.byteCount() == Self.size)
        }
    }

    @Test("--discard ignore answers EOPNOTSUPP")
    func ignoresDiscard() throws {
        try onDisk(mountOptions: ["--discard", "ignore"]) { (file, _) throws in
            expectError(EOPNOTSUPP) { try file.punch(0..<64.KiB) }
            #expect(try holds(file, 0..<64.KiB, 0xA1))
        }
    }

    @Test("seeks data and holes to the granularity of clusters")
    func seeks() throws {
        try onDisk { (file, _) throws in
            #expect(try file.dataRanges() == [0..<128.KiB, 1.MiB..<1.MiB + 64.KiB])
            try file.write([1], at: 5.MiB + 7)
            #expect(try file.nextData(from: 2.MiB) == 5.MiB)
            #expect(try file.nextHole(from: 5.MiB) == 5.MiB + 64.KiB)
            expectError(ENXIO) { _ = try file.nextHole(from: Self.size) }
            expectError(ENXIO) { _ = try file.nextHole(from: -1) }
            #expect(try file.nextData(from: -1) == nil)
        }
    }

    @Test("a store to a shared mapping is data at once", arguments: [[], ["--writeback", "on"]])
    func seeksMappings(options: [String]) throws {
        try onDisk(mountOptions: options) { (file, _) throws in
            let memory = mmap(
                nil, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file.descriptor, off_t(4.MiB))
            try #require(memory != MAP_FAILED)
            memory!.storeBytes(of: 0x55, as: UInt8.self)
            #expect(try file.nextData(from: 2.MiB) == 4.MiB)
            munmap(memory, 4096)
            try file.sync()
            #expect(try file.read(4.MiB..<4.MiB + 1) == [0x55])
        }
    }

    @Test("stat tells size, owner, allocated blocks and the image's time")
    func stats() throws {
        try onDisk { (file, mount) throws in
            let status = try file.status()
            let image = try TestFile(mount.image, O_RDONLY).status()
            #expect(Int(status.st_size) == Self.size)
            #expect(status.st_uid == geteuid() && status.st_mode & 0o777 == 0o600)
            #expect(status.st_mtim.tv_sec == image.st_mtim.tv_sec)
            // At once, where there are few tables.
            #expect(status.st_blocks == 192.KiB / 512)
            try file.write([UInt8](repeating: 1, count: 64.KiB), at: 6.MiB)
            #expect(eventually { (try? file.status().st_blocks) == 256.KiB / 512 })
            try file.punch(6.MiB..<6.MiB + 64.KiB)
            #expect(eventually { (try? file.status().st_blocks) == 192.KiB / 512 })
        }
    }

    @Test("a size that is no multiple of 512 is shown rounded down")
    func roundsSizeDown() throws {
        try onDisk(
            prepare: { folder, path in
                var bytes = ImageBuilder(byteCount: 65536).build()
                bytes.put(UInt64(65543), at: 24)
                _ = try folder.write(bytes, to: "disk.qcow2")
            }, { (file, _) throws in #expect(try file.byteCount() == 65536) })
    }

    @Test("inode numbers stay over remounts")
    func inodes() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let numbers = try (0..<2).map { _ in
            let mount = try TestMount(image, in: folder)
            defer { try? mount.unmount() }
            var status = stat()
            #expect(stat(mount.disk, &status) == 0)
            return status.st_ino
        }
        #expect(numbers[0] == numbers[1])
    }

    @Test("direct, synchronous and buffered writers see each other's bytes")
    func directWrites() throws {
        try onDisk { (file, mount) throws in
            let direct = try mount.open(O_RDWR | O_DIRECT)
            let page = UnsafeMutableRawBufferPointer.allocate(byteCount: 4096, alignment: 4096)
            defer { page.deallocate() }
            page.initializeMemory(as: UInt8.self, repeating: 0x3C)
            try direct.write(UnsafeRawBufferPointer(page), at: 3.MiB)
            #expect(try holds(file, 3.MiB..<3.MiB + 4096, 0x3C))
            try file.write([UInt8](repeating: 0x3D, count: 4096), at: 3.MiB)
            try direct.read(into: page, at: 3.MiB)
            #expect(page.allSatisfy { $0 == 0x3D })
        }
    }
}
