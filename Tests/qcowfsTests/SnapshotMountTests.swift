import Foundation
import TestSupport
import Testing

/// Snapshots and sizes of images, mounted or not, with the program.
@Suite("Snapshot verb and mount", .serialized, .enabledWhereMountable)
struct SnapshotMountTests {
    private func names(_ mount: TestMount) throws -> [String] {
        try FileManager.default.contentsOfDirectory(atPath: mount.mountpoint).sorted()
    }

    private func snapshot(_ words: String...) throws {
        try Command.require([TestEnvironment.program, "snapshot"] + words)
    }

    @Test("snapshot makes, lists, applies and deletes as qemu-img does")
    func offline() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        try snapshot("-c", "first", image)
        try QemuImg.io(image, ["write -q -P 0xB1 0 1M"])
        try snapshot("-c", "2", image)
        let ours = try qcowfs("snapshot", "-l", image).output
        let theirs = try Command.require("qemu-img", "snapshot", "-l", image)
        #expect(
            ours.split(separator: "\n").map { $0.split(separator: " ").prefix(2) }
                == theirs.split(separator: "\n").map { $0.split(separator: " ").prefix(2) })
        let json = try qcowfs("snapshot", "-l", "--output", "json", image).output
        let list = try JSONSerialization.jsonObject(with: Data(json.utf8)) as? [[String: Any]]
        #expect(list?.map { $0["name"] as? String } == ["first", "2"])
        #expect(list?.allSatisfy { $0["vm-state-size"] as? Int == 0 && $0["id"] != nil } == true)
        // An identifier goes before a name: 2 is the second snapshot either way, 1 the first.
        try snapshot("-a", "1", image)
        #expect(!(try QemuImg.io(image, ["read -P 0xA1 0 128k"])).contains("failed"))
        try snapshot("-d", "2", image)
        try snapshot("-d", "first", image)
        #expect(try Command.require("qemu-img", "snapshot", "-l", image).isEmpty)
        #expect(try QemuImg.check(image).status == 0)
        expectRefusal(try qcowfs("snapshot", "-d", "none", image), naming: "none", "disk.qcow2")
        expectRefusal(try qcowfs("snapshot", "-a", "none", image), naming: "none")
        #expect(try qcowfs("snapshot", "-a", "x", "-c", "y", image).status == 64)
    }

    @Test("Through the daemon: create, apply and delete while a client has the disk open")
    func mounted() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let mount = try TestMount(image, in: folder, options: ["--snapshots"])
        #expect(try names(mount) == ["disk.raw"])
        do {
            let file = try mount.open()
            try file.write([UInt8](repeating: 0x11, count: 70_000), at: 5000)
            try snapshot("-c", "a", image)
            #expect(try names(mount) == ["disk.raw", "disk@a.raw"])
            try file.write([UInt8](repeating: 0x22, count: 70_000), at: 5000)
            let kept = try TestFile(mount.mountpoint + "/disk@a.raw", O_RDONLY)
            #expect(try holds(kept, 5000..<75_000, 0x11))
            #expect(try holds(file, 5000..<75_000, 0x22))
            let refusal = #expect(throws: CallError.self) {
                try TestFile(mount.mountpoint + "/disk@a.raw", O_RDWR)
            }
            #expect(refusal?.code == EROFS)
            #expect(truncate(mount.mountpoint + "/disk@a.raw", 1 << 30) != 0 && errno == EROFS)
            expectRefusal(try qcowfs("snapshot", "-d", "a", image), naming: "being read")
            try snapshot("-a", "a", image)
            #expect(try holds(file, 5000..<75_000, 0x11))
            let list = try qcowfs("snapshot", "-l", image).output
            #expect(list.contains(" a "))
            withExtendedLifetime(kept) {}
            try snapshot("-c", "b", image)
            #expect(try names(mount) == ["disk.raw", "disk@a.raw", "disk@b.raw"])
            try snapshot("-d", "b", image)
            #expect(try names(mount) == ["disk.raw", "disk@a.raw"])
            #expect(access(mount.mountpoint + "/disk@b.raw", F_OK) != 0)
            withExtendedLifetime(file) {}
        }
        try mount.unmount()
    }

    @Test("A snapshot's file is read-only to its owner as to root, and says so")
    func readOnlyToItsOwner() throws {
        guard geteuid() == 0 else { return }
        let folder = try TemporaryDirectory(in: "/tmp")
        chmod(folder.path, 0o755)
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        try snapshot("-c", "kept", image)
        let mount = try TestMount(
            image, in: folder, options: ["--snapshots", "-o", "allow_other,uid=65534,gid=65534"])
        let file = mount.mountpoint + "/disk@kept.raw"
        for user in ["0", "65534"] {
            let write = try Command.run([
                "setpriv", "--reuid=\(user)", "--regid=\(user)", "--clear-groups", "sh", "-c",
                "exec 3<>\"$1\"", "sh", file,
            ])
            #expect(write.status != 0 && write.errors.contains("Read-only"), "\(write)")
            let read = try Command.run([
                "setpriv", "--reuid=\(user)", "--regid=\(user)", "--clear-groups", "head", "-c",
                "1", file,
            ])
            #expect(read.status == 0, "\(read)")
        }
    }

    @Test("An image of a snapshot mount is clean afterwards, and QEMU sees what was made")
    func cleanAfterwards() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let mount = try TestMount(image, in: folder, options: ["--snapshots"])
        do {
            let file = try mount.open()
            for round in 0..<4 {
                try file.write(
                    [UInt8](repeating: UInt8(round + 1), count: 300_000), at: round * 100_000)
                try snapshot("-c", "s\(round)", image)
            }
            try snapshot("-d", "s1", image)
            let kept = try TestFile(mount.mountpoint + "/disk@s2.raw", O_RDONLY)
            #expect(try holds(kept, 200_000..<500_000, 3))
        }
        try mount.unmount()
        #expect(try QemuImg.check(image).status == 0)
        let raw = folder.file("s0.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw", flags: ["-l", "s0"])
        #expect(try holds(TestFile(raw, O_RDONLY), 0..<300_000, 1))
    }

    @Test("Names with slashes, control characters and leading dots, equal names and long ones")
    func names() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        for name in ["a/b", ".hidden", "tab\there", "x", "x", String(repeating: "n", count: 250)] {
            try QemuImg.snapshot(image, create: name)
        }
        let mount = try TestMount(image, in: folder, options: ["--snapshots"])
        #expect(
            try Set(names(mount)) == [
                "disk.raw", "disk@a%2Fb.raw", "disk@%2Ehidden.raw", "disk@tab%09here.raw",
                "disk@4.raw", "disk@5.raw", "disk@6.raw",
            ])
        for name in try names(mount) {
            #expect(try holds(TestFile(mount.mountpoint + "/" + name, O_RDONLY), 0..<4096, 0xA1))
        }
        try mount.unmount()
    }

    @Test("a snapshot's image goes after the last close, when every request has left it")
    func opensAndCloses() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        for name in ["a", "b", "c"] { try QemuImg.snapshot(image, create: name) }
        let mount = try TestMount(image, in: folder, options: ["--snapshots"])
        for round in 0..<600 {
            let name = "disk@\(["a", "b", "c"][round % 3]).raw"
            #expect(try holds(TestFile(mount.mountpoint + "/" + name, O_RDONLY), 0..<4096, 0xA1))
        }
        try mount.unmount()
    }

    @Test("Trap 57: a snapshot of another size is shown and applied with its own size")
    func sizes() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image, size: 4.MiB)
        try QemuImg.snapshot(image, create: "small")
        try Command.require(TestEnvironment.program, "resize", image, "+4M")
        let mount = try TestMount(image, in: folder, options: ["--snapshots"])
        do {
            let small = try TestFile(mount.mountpoint + "/disk@small.raw", O_RDONLY)
            #expect(try small.byteCount() == 4.MiB && mount.open().byteCount() == 8.MiB)
        }
        try snapshot("-a", "small", image)
        #expect(try mount.open(O_RDONLY).byteCount() == 4.MiB)
        try mount.unmount()
        #expect(try QemuImg.check(image).status == 0)
    }

    @Test("resize grows a mounted image, with the hint for loop devices, and shrinks with --shrink")
    func resizes() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let program = TestEnvironment.program
        expectRefusal(try qcowfs("resize", image, "-1M"), naming: "--shrink")
        try Command.require(program, "resize", "--shrink", image, "-1M")
        try Command.require(program, "resize", image, "16M", "--preallocation", "full")
        #expect(try qcowfs("resize", image).status == 64)
        #expect(try qcowfs("resize", image, "lots").status == 64)
        #expect(try qcowfs("resize", "--frobnicate", image, "1M").status == 64)
        let mount = try TestMount(image, in: folder)
        do {
            let file = try mount.open()
            try file.write([7], at: 16.MiB - 1)
            let result = try qcowfs("resize", image, "+16M")
            #expect(result.status == 0 && result.errors.contains("losetup -c"), "\(result)")
            #expect(try file.byteCount() == 32.MiB)
            #expect(try holds(file, 16.MiB..<32.MiB, 0))
            expectRefusal(try qcowfs("resize", image, "-8M"), naming: "shrink")
            try Command.require(program, "resize", "--shrink", image, "-20M")
            #expect(try file.byteCount() == 12.MiB)
        }
        try mount.unmount()
        #expect(try QemuImg.check(image).status == 0)
    }

    @Test(
        "Whoever asks for another size finds it at once, beside busy writers too",
        arguments: [[], ["--writeback", "on"]])
    func sizeAtOnce(options: [String]) throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image, size: 64.MiB)
        let mount = try TestMount(image, in: folder, options: options)
        try onThreads(4) { index in
            let file = try mount.open()
            if index == 0 {
                for round in 1...8 {
                    try Command.require(TestEnvironment.program, "resize", image, "+16M")
                    let found = try file.byteCount()
                    guard found == 64.MiB + round * 16.MiB else {
                        throw RandomRun.Difference(description: "change \(round): \(found) bytes")
                    }
                }
            } else {
                let bytes = [UInt8](repeating: 7, count: 8.MiB)
                for round in 0..<24 { try file.write(bytes, at: round % 2 * 24.MiB) }
            }
        }
        try mount.unmount()
        #expect(try QemuImg.check(image).status == 0)
    }

    @Test("A file that is a mountpoint has no place for snapshots")
    func fileMountpoint() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let target = try folder.write([], to: "target")
        expectRefusal(
            try qcowfs("mount", "--snapshots", image, target), naming: "directory", "--snapshots")
    }

    @Test("A mounted directory of images shows their snapshots too, open or not")
    func mirror() throws {
        let folder = try TemporaryDirectory()
        let images = try folder.directory("images")
        for name in ["one", "two"] {
            try makeImage("\(images)/\(name).qcow2")
            try QemuImg.snapshot("\(images)/\(name).qcow2", create: "kept")
        }
        let mount = try TestMount(images, in: folder, options: ["--snapshots"])
        #expect(
            try names(mount) == ["one.raw", "one@kept.raw", "two.raw", "two@kept.raw"])
        do {
            let kept = try TestFile(mount.mountpoint + "/two@kept.raw", O_RDONLY)
            let disk = try TestFile(mount.mountpoint + "/two.raw", O_RDWR)
            try disk.write([UInt8](repeating: 9, count: 4096), at: 0)
            #expect(try holds(kept, 0..<4096, 0xA1) && holds(disk, 0..<4096, 9))
        }
        try mount.unmount()
    }

    @Test(
        "Snapshots with subclusters, or encrypted, stay what they were while the disk is written",
        arguments: [
            Combination(
                clusterSize: 65536, content: .qcow2Backing, isExtended: true, hasSnapshots: true),
            Combination(clusterSize: 65536, encryption: .aes, hasSnapshots: true),
            Combination(
                clusterSize: 16384, isExtended: true, encryption: .twofish, hasSnapshots: true),
        ])
    func otherKinds(_ combination: Combination) throws {
        let folder = try TemporaryDirectory()
        let prepared = try combination.prepare(in: folder, seed: TestEnvironment.seed)
        let image = prepared.image
        let passphrase = try folder.write(Array(image.passphrase.utf8), to: "passphrase")
        let mount = try TestMount(
            image.path, in: folder,
            options: ["--snapshots"] + (image.isEncrypted ? ["--passphrase-file", passphrase] : []))
        #expect(
            try names(mount) == [
                "disk.raw", "disk@first.raw", "disk@second.raw", "disk@third.raw",
            ])
        do {
            let file = try mount.open()
            try file.write([UInt8](repeating: 0x11, count: 70_000), at: 5000)
            try snapshot("-c", "made", image.path)
            // Less than a subcluster has, and a hole.
            try file.write([UInt8](repeating: 0x22, count: 100), at: 5100)
            try file.punch(20_000..<60_000)
            for (name, model) in prepared.snapshots {
                let kept = try TestFile(mount.mountpoint + "/disk@\(name).raw", O_RDONLY)
                #expect(try kept.read(0..<model.byteCount).elementsEqual(model.bytes))
            }
            let made = try TestFile(mount.mountpoint + "/disk@made.raw", O_RDONLY)
            #expect(try holds(made, 5000..<75_000, 0x11))
            #expect(try holds(file, 5100..<5200, 0x22) && holds(file, 20_000..<60_000, 0))
            try snapshot("-a", "made", image.path)
            #expect(try holds(file, 5000..<75_000, 0x11))
        }
        #expect(
            try eventually { try qcowfs("snapshot", "-d", "first", image.path).status == 0 })
        try mount.unmount()
        #expect(try image.check().status == 0)
        for name in ["second", "third"] {
            let theirs = try image.disk(in: folder, snapshot: name)
            let ours = try #require(prepared.snapshots[name])
            #expect(theirs.bytes.elementsEqual(ours.bytes))
        }
    }
}
