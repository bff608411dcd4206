import Glibc
import TestSupport
import Testing

/// What is refused, by name, in one line, with nothing mounted and nothing changed.
@Suite("Refusals", .serialized, .enabledWhereMountable)
struct RefusalTests {
    private func refuses(
        _ name: String = "disk.qcow2", options: [String] = [], naming words: [String],
        sourceLocation: SourceLocation = #_sourceLocation,
        prepare: (TemporaryDirectory, String) throws -> Void
    ) throws {
        let folder = try TemporaryDirectory()
        let image = folder.file(name)
        try prepare(folder, image)
        try expectMountRefused(
            image, in: folder, options: options, naming: words, sourceLocation: sourceLocation)
    }

    @Test("an unknown incompatible feature, by the name that the image gives it")
    func unknownFeature() throws {
        try refuses(naming: ["disk.qcow2", "time travel"]) { folder, _ in
            var image = ImageBuilder(byteCount: 1.MiB)
            image.incompatibleFeatures = 1 << 17
            let name = Array("time travel".utf8)
            image.extensions = [
                (0x6803_f857, [0, 17] + name + [UInt8](repeating: 0, count: 46 - name.count))
            ]
            _ = try folder.write(image.build(), to: "disk.qcow2")
        }
    }

    @Test("what is no qcow2 image, and is left as it was")
    func noImage() throws {
        try refuses("notes.txt", naming: ["notes.txt", "not a qcow2"]) { folder, _ in
            _ = try folder.write(Array("hello".utf8), to: "notes.txt")
        }
        try refuses(naming: ["disk.qcow2"]) { folder, _ in
            _ = try folder.write([], to: "disk.qcow2")
        }
    }

    @Test("qcow version 1")
    func versionOne() throws {
        try refuses(naming: ["disk.qcow2", "version 1"]) { folder, _ in
            var bytes = ImageBuilder(byteCount: 1.MiB).build()
            bytes.put(UInt32(1), at: 4)
            _ = try folder.write(bytes, to: "disk.qcow2")
        }
    }

    @Test("a FIFO, without waiting for a writer")
    func fifo() throws {
        try refuses("pipe.qcow2", naming: ["pipe.qcow2"]) { _, image in
            #expect(mkfifo(image, 0o600) == 0)
        }
    }

    @Test("a corrupt-marked image for writing, naming --read-only and repair")
    func corrupt() throws {
        let folder = try TemporaryDirectory()
        var image = ImageBuilder(byteCount: 1.MiB)
        image.fill(0x42, guestCluster: 0)
        image.incompatibleFeatures = 2
        let path = try folder.write(image.build(), to: "disk.qcow2")
        try expectMountRefused(path, in: folder, naming: ["--read-only", "check --repair all"])
        let mount = try TestMount(path, in: folder, options: ["--read-only"])
        #expect(try holds(mount.open(O_RDONLY), 0..<4096, 0x42))
        try mount.unmount()
    }

    @Test("a missing image, a missing mountpoint, a mountpoint that is neither file nor directory")
    func missing() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let mountpoint = try folder.directory("mnt")
        expectRefusal(
            try qcowfs("mount", folder.file("none.qcow2"), mountpoint), naming: "none.qcow2")
        expectRefusal(try qcowfs("mount", image, folder.file("nowhere")), naming: "nowhere")
        expectRefusal(try qcowfs("mount", image, "/dev/null"), naming: "/dev/null")
    }

    @Test(
        "wrong usage ends with 64",
        arguments: [
            ["mount"], ["mount", "--no-such-option", "a", "b"], ["frobnicate"], ["umount"],
            ["mount", "--cache-size", "lots", "a", "b"],
        ])
    func usage(words: [String]) throws {
        let result = try Command.run([TestEnvironment.program] + words)
        #expect(result.status == 64, "\(result)")
        #expect(result.output.isEmpty)
    }

    @Test("--help and --version end with 0")
    func help() throws {
        for words in [["--help"], ["--version"], ["help", "mount"], ["mount", "--help"]] {
            let result = try Command.run([TestEnvironment.program] + words)
            #expect(result.status == 0 && !result.output.isEmpty, "\(result)")
        }
    }

    /// Runs the program as an unprivileged user; nil where it lies where that user cannot go.
    private func asNobody(_ words: String...) throws -> Command.Result? {
        let result = try Command.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", TestEnvironment.program]
                + words)
        let isOutOfReach =
            result.errors.contains("ermission denied") && result.errors.contains("exec")
        return isOutOfReach ? nil : result
    }

    @Test("another user's mount is not taken away")
    func mountOfAnotherUser() throws {
        guard geteuid() == 0 else { return }
        let folder = try TemporaryDirectory(in: "/tmp")
        chmod(folder.path, 0o755)
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        let mount = try TestMount(image, in: folder)
        if let result = try asNobody("umount", mount.mountpoint) {
            expectRefusal(result, naming: mount.mountpoint, "another user (id 0)", "root can")
        }
        try mount.unmount()
    }

    @Test("an unprivileged user without permission to write is told of --read-only")
    func readableOnly() throws {
        guard geteuid() == 0 else { return }
        let folder = try TemporaryDirectory(in: "/tmp")
        chmod(folder.path, 0o755)
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        chmod(image, 0o444)
        let mountpoint = try folder.directory("mnt")
        chown(mountpoint, 65534, 65534)
        guard let result = try asNobody("mount", image, mountpoint) else { return }
        expectRefusal(result, naming: "disk.qcow2", "Permission denied", "--read-only")
    }

    @Test("an image on a read-only file system, naming --read-only")
    func readOnlyFileSystem() throws {
        guard geteuid() == 0 else { return }
        let folder = try TemporaryDirectory()
        let disk = try folder.directory("disk")
        try Command.require("mount", "-t", "tmpfs", "none", disk)
        defer { _ = try? Command.run(["umount", disk]) }
        try makeImage(disk + "/disk.qcow2")
        try Command.require("mount", "-o", "remount,ro", disk)
        try expectMountRefused(
            disk + "/disk.qcow2", in: folder, naming: ["Read-only file system", "--read-only"])
    }
}
