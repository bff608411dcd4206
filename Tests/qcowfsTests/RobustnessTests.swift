import Foundation
import TestSupport
import Testing

/// Full file systems, dirty images, mixed writers: what goes wrong around an image.
@Suite("Robustness", .serialized, .enabledWhereMountable)
struct RobustnessTests {
    @Test("an image that was not closed is repaired when it is mounted for writing")
    func dirtyImage() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image, options: ["lazy_refcounts=on"])
        // qemu-io dies without closing: counts are behind, and the dirty bit says so.
        _ = try Command.run([
            "qemu-io", "-f", "qcow2", "-c", "write -q -P 0x77 2M 512k", "-c", "flush",
            "-c", "sigraise 9", image,
        ])
        #expect(try isDirty(image))
        let before = try Command.require("sha256sum", image)
        let reading = try TestMount(image, in: folder, options: ["--read-only"])
        #expect(try holds(reading.open(O_RDONLY), 2.MiB..<2.MiB + 512.KiB, 0x77))
        try reading.unmount()
        #expect(try Command.require("sha256sum", image) == before)
        let writing = try TestMount(image, in: folder)
        #expect(try holds(writing.open(O_RDONLY), 2.MiB..<2.MiB + 512.KiB, 0x77))
        try write(writing, 0x78, at: 4.MiB)
        try writing.unmount()
        #expect(try !isDirty(image))
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
        try QemuImg.io(image, ["read -q -P 0x77 2M 512k", "read -q -P 0x78 4M 64k"])
    }

    private func isDirty(_ image: String) throws -> Bool {
        try ReferenceImage(image).qcow2.incompatibleFeatures & 1 == 1
    }

    private func write(_ mount: TestMount, _ byte: UInt8, at offset: Int) throws {
        try mount.open().write([UInt8](repeating: byte, count: 64.KiB), at: offset)
    }

    @Test(
        "where the host has no room, the writer is told, and goes on when there is room again",
        .enabledWhereLoopable, arguments: ["tmpfs", "ext4"])
    func fullHost(fileSystem: String) throws {
        let folder = try TemporaryDirectory()
        let small = try mountSmall(fileSystem, in: folder)
        defer { _ = try? Command.run(["umount", small]) }
        let ballast = try TestFile(small + "/ballast", O_RDWR | O_CREAT)
        try ballast.write([UInt8](repeating: 1, count: 1.MiB), at: 0)
        try ballast.sync()
        let image = small + "/disk.qcow2"
        try makeImage(image, size: 512.MiB)
        let mount = try TestMount(image, in: folder)
        let synced = try fill(mount)
        #expect(synced > 1)
        #expect(try content(of: mount, synced), "what was synced is not there")

        try ballast.truncate(to: 0)
        try ballast.sync()
        try write(mount, 0xEE, at: 1.MiB)
        try mount.open().sync()
        #expect(try content(of: mount, synced), "what was synced is gone")
        try mount.unmount()
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
        try QemuImg.io(
            image,
            ["read -q -P 0xEE 1M 64k"]
                + (0..<synced).map { "read -q -P \($0 + 1) \(2 + $0)M 64k" })
    }

    /// A file system with little room.
    private func mountSmall(_ kind: String, in folder: TemporaryDirectory) throws -> String {
        let small = try folder.directory("small")
        if kind == "tmpfs" {
            try Command.require("mount", "-t", "tmpfs", "-o", "size=3m", "none", small)
        } else {
            let file = folder.file("small.ext4")
            try TestFile(file, O_RDWR | O_CREAT).truncate(to: 12.MiB)
            try Command.require("mkfs.ext4", "-q", "-m", "0", file)
            try Command.require("mount", "-o", "loop", file, small)
        }
        return small
    }

    private func content(of mount: TestMount, _ synced: Int) throws -> Bool {
        let file = try mount.open(O_RDONLY)
        return try (0..<synced).allSatisfy { index in
            let start = (2 + index).MiB
            return try holds(file, start..<start + 64.KiB, UInt8(index + 1))
        }
    }

    /// Writes and syncs until there is no room; returns how many 64 KiB pieces were synced.
    private func fill(_ mount: TestMount) throws -> Int {
        let file = try mount.open()
        for index in 0..<200 {
            do {
                try file.write(
                    [UInt8](repeating: UInt8(index + 1), count: 64.KiB), at: (2 + index).MiB)
                try file.sync()
            } catch let error as CallError {
                #expect(error.code == ENOSPC, "\(error)")
                return index
            }
        }
        Issue.record("it was never full")
        return 0
    }

    @Test(
        "direct, buffered and mapped writers do not lose each other's bytes",
        arguments: [[], ["--writeback", "on"]])
    func mixedWriters(options: [String]) throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        let size = 8.MiB
        try makeImage(image, size: size, commands: ["write -q -P 0x11 0 4M"])
        let mount = try TestMount(image, in: folder, options: options)
        let model = try ReferenceDisk(contentsOf: mount.disk)
        try write(mount, model, size)
        let after = try ReferenceDisk(contentsOf: mount.disk)
        let place = model.firstDifference(
            in: 0..<size, from: UnsafeRawBufferPointer(after.bytes))
        #expect(place == nil, "the disk differs at \(place ?? 0)")
        try mount.unmount()
        let raw = folder.file("model.raw")
        try model.save(to: raw)
        #expect(try QemuImg.difference(raw, image) == nil)
        #expect(try QemuImg.check(image).status == 0)
    }

    /// Four threads, each with a way of its own; pages are dealt out so that neighbours differ.
    private func write(_ mount: TestMount, _ model: ReferenceDisk, _ size: Int) throws {
        let reservations = RangeReservations()
        try onThreads(4) { index in
            var random = RepeatableRandom(seed: UInt64(index) + 99)
            let file = try mount.open(index == 0 ? O_RDWR | O_DIRECT : O_RDWR)
            let page = UnsafeMutableRawBufferPointer.allocate(byteCount: 16384, alignment: 4096)
            defer { page.deallocate() }
            let memory = mmap(
                nil, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.descriptor, 0)
            defer { munmap(memory, size) }
            for step in 0..<150 {
                let count = (1 + random.number(below: 4)) * 4096
                let start = random.number(below: (size - count) / 4096 + 1) * 4096
                let byte = UInt8(truncatingIfNeeded: step &* 4 &+ index) | 1
                _ = try reservations.with(start..<start + count) {
                    let bytes = UnsafeMutableRawBufferPointer(rebasing: page[..<count])
                    bytes.initializeMemory(as: UInt8.self, repeating: byte)
                    if index == 3, let memory, memory != MAP_FAILED {
                        (memory + start).copyMemory(from: bytes.baseAddress!, byteCount: count)
                    } else {
                        try file.write(UnsafeRawBufferPointer(bytes), at: start)
                    }
                    model.write(UnsafeRawBufferPointer(bytes), at: start)
                    let seen = try file.read(start..<start + count)
                    guard index == 3 || seen.allSatisfy({ $0 == byte }) else {
                        throw Command.Failure(
                            description: "writer \(index) does not see its own bytes at \(start)")
                    }
                }
            }
            if index == 3 { try file.sync() }
        }
    }

    @Test("a chain of fifty files is read to its bottom")
    func longChain() throws {
        let folder = try TemporaryDirectory()
        var below: String?
        for layer in 0..<50 {
            var image = ImageBuilder(byteCount: 8.MiB)
            image.fill(UInt8(layer + 1), guestCluster: layer)
            if let below {
                image.backingName = below
                image.extensions = [(0xe279_2aca, Array("qcow2".utf8))]
            }
            below = "layer\(layer).qcow2"
            _ = try folder.write(image.build(), to: below!)
        }
        let mount = try TestMount(folder.file("layer49.qcow2"), in: folder)
        try expectLayers(mount)
        try mount.unmount()
        #expect(try QemuImg.check(folder.file("layer49.qcow2")).status == 0)
    }

    private func expectLayers(_ mount: TestMount) throws {
        let file = try mount.open()
        for layer in 0..<50 {
            #expect(try holds(file, layer * 65536..<(layer + 1) * 65536, UInt8(layer + 1)))
        }
        // Copied up through fifty layers, but for one byte.
        try file.write([0xFF], at: 100)
        #expect(try holds(file, 0..<100, 1) && holds(file, 101..<65536, 1))
    }

    @Test("a chain deeper than the limit is refused, not followed until descriptors run out")
    func tooLongChain() throws {
        let folder = try TemporaryDirectory()
        for layer in 0..<230 {
            var image = ImageBuilder(byteCount: 1.MiB, clusterBits: 9)
            if layer > 0 {
                image.backingName = "layer\(layer - 1).qcow2"
                image.extensions = [(0xe279_2aca, Array("qcow2".utf8))]
            }
            _ = try folder.write(image.build(), to: "layer\(layer).qcow2")
        }
        try expectMountRefused(folder.file("layer229.qcow2"), in: folder, naming: ["200"])
    }

    @Test(
        "the largest disks are mounted, searched and written in seconds",
        arguments: [(512, 128 << 30), (65536, 1 << 50), (2 << 20, 1 << 60)])
    func hugeDisks(clusterSize: Int, size: Int) throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try QemuImg.create(image, size: size, options: ["cluster_size=\(clusterSize)"])
        let started = Date()
        let mount = try TestMount(image, in: folder)
        try useTheEnd(mount, size)
        try mount.unmount()
        #expect(Date().timeIntervalSince(started) < 10)
        try QemuImg.io(image, ["read -q -P 0x5E \(size - 4096) 4096", "read -q -P 0 0 4096"])
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
    }

    private func useTheEnd(_ mount: TestMount, _ size: Int) throws {
        let file = try mount.open()
        #expect(try file.byteCount() == size)
        #expect(try file.nextData(from: 0) == nil)
        try file.write([UInt8](repeating: 0x5E, count: 4096), at: size - 4096)
        let data = try #require(try file.nextData(from: 0))
        #expect(data <= size - 4096 && data >= size - 2.MiB)
        try file.sync()
    }

    @Test("a damaged entry is EIO for its own bytes, and the rest of the disk is there")
    func damagedEntry() throws {
        let folder = try TemporaryDirectory()
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.fill(0x11, guestCluster: 0)
        builder.setEntry(0x8000_0000_0000_1200, guestCluster: 1)
        builder.fill(0x22, guestCluster: 2)
        let image = try folder.write(builder.build(), to: "disk.qcow2")
        let mount = try TestMount(image, in: folder, options: ["--read-only"])
        try expectDamage(mount)
        try mount.unmount()
    }

    private func expectDamage(_ mount: TestMount) throws {
        let file = try mount.open(O_RDONLY)
        #expect(try holds(file, 0..<64.KiB, 0x11))
        #expect(throws: CallError.self) { try file.read(64.KiB..<64.KiB + 4096) }
        #expect(try holds(file, 128.KiB..<192.KiB, 0x22))
    }

    @Test("random damage to tables gives errors or bytes, never a hang or a dead daemon")
    func randomDamage() throws {
        let folder = try TemporaryDirectory()
        let clean = folder.file("clean.qcow2")
        try makeImage(
            clean, options: ["cluster_size=4096"],
            commands: ["write -q -P 1 0 1M", "write -q -z 2M 64k", "write -q -P 2 4M 300k"])
        try QemuImg.snapshot(clean, create: "kept")
        let bytes = try TestFile(clean, O_RDONLY).read(0..<40_000)
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        for round in 0..<(TestEnvironment.isLong ? 400 : 40) {
            let image = folder.file("damaged.qcow2")
            try? FileManager.default.removeItem(atPath: image)
            try FileManager.default.copyItem(atPath: clean, toPath: image)
            do {
                let file = try TestFile(image, O_RDWR)
                for _ in 0..<1 + random.number(below: 6) {
                    // Header, tables and counts all lie in the first clusters.
                    let place = random.number(below: round % 2 == 0 ? 512 : bytes.count)
                    let damage = UInt8(truncatingIfNeeded: random.next())
                    try file.write([bytes[place] ^ damage], at: place)
                }
            }
            try survive(image, folder, round)
        }
    }

    /// Mounts, reads and writes; whatever is refused, nothing may hang or crash.
    private func survive(_ image: String, _ folder: TemporaryDirectory, _ round: Int) throws {
        let mountpoint = folder.file("mnt")
        mkdir(mountpoint, 0o755)
        let result = try qcowfs("mount", image, mountpoint, timeout: 20)
        guard result.status == 0 else {
            return expectRefusal(result)
        }
        _ = try Command.run(
            [
                "dd", "if=\(mountpoint)/damaged.raw", "of=/dev/null", "bs=1M", "count=64",
                "conv=noerror", "status=none",
            ], timeout: 60)
        _ = try Command.run(
            [
                "dd", "if=/dev/zero", "of=\(mountpoint)/damaged.raw", "bs=4k", "count=64",
                "seek=300",
                "conv=notrunc", "status=none",
            ], timeout: 60)
        #expect(TestMount.daemons(naming: mountpoint).count == 1, "round \(round): it crashed")
        let unmounted = try qcowfs("umount", mountpoint, timeout: 30)
        #expect(unmounted.status <= 1, "round \(round): \(unmounted)")
        #expect(!TestMount.isMountpoint(mountpoint), "round \(round)")
    }
}
