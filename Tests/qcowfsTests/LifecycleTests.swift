import Foundation
import TestSupport
import Testing

/// How a mount begins and ends.
@Suite("Lifecycle", .serialized, .enabledWhereMountable)
struct LifecycleTests {
    private func image(_ folder: TemporaryDirectory, _ name: String = "disk.qcow2") throws -> String
    {
        let path = folder.file(name)
        try makeImage(path)
        return path
    }

    private func write(_ mount: TestMount, _ byte: UInt8, at offset: Int, sync: Bool) throws {
        let file = try mount.open()
        try file.write([UInt8](repeating: byte, count: 64.KiB), at: offset)
        if sync { try file.sync() }
    }

    @Test("NAME.raw appears in a directory, and is gone after umount")
    func directoryMountpoint() throws {
        let folder = try TemporaryDirectory()
        let mount = try TestMount(try image(folder), in: folder)
        #expect(
            try FileManager.default.contentsOfDirectory(atPath: mount.mountpoint) == ["disk.raw"])
        try mount.unmount()
        #expect(try FileManager.default.contentsOfDirectory(atPath: mount.mountpoint) == [])
    }

    @Test("a regular file becomes the disk", arguments: [[], ["--writeback", "on"]])
    func fileMountpoint(options: [String]) throws {
        let folder = try TemporaryDirectory()
        let mountpoint = try folder.write([1, 2, 3], to: "target")
        let mount = try TestMount([try image(folder)], on: mountpoint, options: options)
        do {
            let file = try TestFile(mountpoint, O_RDWR)
            #expect(try file.byteCount() == 8.MiB)
            #expect(try holds(file, 0..<4096, 0xA1))
            try file.write([7, 7], at: 4.MiB)
        }
        try mount.unmount()
        #expect(try TestFile(mountpoint, O_RDONLY).read(0..<10) == [1, 2, 3])
        try QemuImg.io(folder.file("disk.qcow2"), ["read -P 7 4M 2"])
    }

    @Test("several images share one daemon")
    func severalImages() throws {
        let folder = try TemporaryDirectory()
        let images = try ["a.qcow2", "b.img", "c.qcow"].map { try image(folder, $0) }
        let mountpoint = try folder.directory("mnt")
        let mount = try TestMount(images, on: mountpoint)
        #expect(
            try FileManager.default.contentsOfDirectory(atPath: mountpoint).sorted()
                == ["a.raw", "b.raw", "c.raw"])
        _ = try mount.daemon()
        try mount.unmount()
    }

    @Test("equal names are an error, and --name gives another one")
    func names() throws {
        let folder = try TemporaryDirectory()
        let mountpoint = try folder.directory("mnt")
        _ = try folder.directory("other")
        let first = try image(folder)
        let second = try image(folder, "other/disk.qcow2")
        expectRefusal(try qcowfs("mount", first, second, mountpoint), naming: "disk.raw")
        let mount = try TestMount([first], on: mountpoint, options: ["--name", "root.raw"])
        let names = try FileManager.default.contentsOfDirectory(atPath: mountpoint)
        #expect(names.count == 1 && names[0].hasPrefix("root"))
        try mount.unmount()
    }

    @Test("the fstab form and its options work")
    func fstabForm() throws {
        let folder = try TemporaryDirectory()
        let mountpoint = try folder.directory("mnt")
        let image = try image(folder)
        let result = try qcowfs(
            image, mountpoint, "-o",
            "ro,noauto,nofail,x-systemd.automount,_netdev,commit-interval=1")
        #expect(result.status == 0, "\(result)")
        #expect(throws: CallError.self) { try TestFile(mountpoint + "/disk.raw", O_RDWR) }
        let table = try String(contentsOfFile: "/proc/self/mounts", encoding: .utf8)
        #expect(
            table.split(separator: "\n").contains {
                $0.contains(mountpoint) && $0.contains("fuse.qcowfs")
            })
        #expect(try qcowfs("umount", mountpoint).status == 0)
    }

    @Test("a pipeline that reads mount's output ends, with an empty environment too")
    func givesUpItsOutput() throws {
        let folder = try TemporaryDirectory()
        let mountpoint = try folder.directory("mnt")
        let image = try image(folder)
        let started = Date()
        try Command.shell(
            """
            x=$(env -i \(TestEnvironment.program) mount \(image) \(mountpoint) 2>&1)
            test -z "$x"
            """,
            timeout: 20)
        #expect(Date().timeIntervalSince(started) < 5)
        #expect(TestMount.daemons(naming: mountpoint).count == 1)
        #expect(try qcowfs("umount", mountpoint).status == 0)
        #expect(TestMount.daemons(naming: mountpoint).isEmpty)
    }

    @Test("the daemon is one process in a session of its own")
    func oneProcess() throws {
        let folder = try TemporaryDirectory()
        let mount = try TestMount(try image(folder), in: folder)
        let daemon = try mount.daemon()
        #expect(getsid(daemon) != getsid(0))
        for descriptor in 0...2 {
            let target = try FileManager.default
                .destinationOfSymbolicLink(atPath: "/proc/\(daemon)/fd/\(descriptor)")
            #expect(target == "/dev/null")
        }
        let children = try? String(
            contentsOfFile: "/proc/\(daemon)/task/\(daemon)/children", encoding: .utf8)
        #expect((children ?? "").isEmpty)
        try mount.unmount()
        #expect(!isRunning(daemon))
    }

    @Test("QEMU has the image the moment umount has returned", arguments: ["qcowfs", "umount"])
    func umountReturnsWhenFree(program: String) throws {
        let folder = try TemporaryDirectory()
        let path = try image(folder)
        for round in 0..<5 {
            let mount = try TestMount(path, in: folder)
            try write(mount, UInt8(round + 1), at: 4.MiB, sync: false)
            if program == "qcowfs" {
                try mount.unmount()
                try QemuImg.io(path, ["read -q -P \(round + 1) 4M 64k"])
            } else {
                // The plain umount returns at once; the next mount waits for the closing daemon.
                try Command.require("umount", mount.mountpoint)
                mount.wasUnmounted()
            }
        }
        let mount = try TestMount(path, in: folder)
        #expect(try holds(mount.open(O_RDONLY), 4.MiB..<4.MiB + 4096, 5))
        try mount.unmount()
    }

    @Test("a killed daemon loses nothing that was synced, and leaks at most")
    func killed() throws {
        let folder = try TemporaryDirectory()
        let path = try image(folder)
        let mount = try TestMount(path, in: folder)
        let daemon = try mount.daemon()
        try write(mount, 0x51, at: 2.MiB, sync: true)
        try write(mount, 0x52, at: 3.MiB, sync: false)
        kill(daemon, SIGKILL)
        #expect(eventually { !isRunning(daemon) })
        let check = try QemuImg.check(path)
        #expect(check.status == 0 || check.status == 3, "\(check)")
        try QemuImg.io(path, ["read -q -P 0x51 2M 64k", "read -q -P 0xA1 0 128k"])
        let cleaned = try qcowfs("umount", mount.mountpoint)
        #expect(cleaned.status == 0, "\(cleaned)")
        #expect(!TestMount.isMountpoint(mount.mountpoint))
        mount.wasUnmounted()
        let again = try TestMount(path, in: folder)
        #expect(try holds(again.open(O_RDONLY), 2.MiB..<2.MiB + 64.KiB, 0x51))
        try again.unmount()
        #expect(try QemuImg.check(path).status == 0 || check.status == 3)
    }

    /// A killed daemon's socket goes a moment before the daemon.  Here another process has it.
    private static let daemonWithoutSocket = """
        import os, socket, sys, time
        device = os.stat(sys.argv[1]).st_dev
        name = f"\\0qcowfs/{os.major(device)}:{os.minor(device)}"
        os.kill(int(sys.argv[2]), 9)
        listener = socket.socket(socket.AF_UNIX)
        while True:
            try:
                listener.bind(name)
                break
            except OSError:
                time.sleep(0.01)
        listener.listen()
        listener.settimeout(60)
        open(sys.argv[3], "w").close()
        connection = listener.accept()[0]
        connection.close()
        listener.close()
        time.sleep(0.3)
        """

    @Test("a daemon that is on its way to its end is waited for")
    func ending() throws {
        let folder = try TemporaryDirectory()
        let mount = try TestMount(try image(folder), in: folder)
        let daemon = try mount.daemon()
        let ending = try Command.start([
            "python3", "-c", Self.daemonWithoutSocket, mount.mountpoint, "\(daemon)",
            folder.file("ready"),
        ])
        try #require(eventually { access(folder.file("ready"), F_OK) == 0 })
        let cleaned = try qcowfs("umount", mount.mountpoint)
        #expect(cleaned.status == 0, "\(cleaned)")
        mount.wasUnmounted()
        #expect(try ending.wait().status == 0)
    }

    @Test("SIGTERM, SIGINT and SIGHUP commit and unmount", arguments: [SIGTERM, SIGINT, SIGHUP])
    func signals(_ signal: Int32) throws {
        let folder = try TemporaryDirectory()
        let path = try image(folder)
        let mount = try TestMount(path, in: folder)
        let daemon = try mount.daemon()
        try write(mount, 0x61, at: 2.MiB, sync: false)
        kill(daemon, signal)
        #expect(eventually { !isRunning(daemon) })
        #expect(!TestMount.isMountpoint(mount.mountpoint))
        mount.wasUnmounted()
        try QemuImg.io(path, ["read -q -P 0x61 2M 64k"])
        #expect(try QemuImg.check(path).status == 0)
    }

    @Test("a busy daemon that is told to end commits, serves on, and ends with the last close")
    func signalWhileBusy() throws {
        let folder = try TemporaryDirectory()
        let path = try image(folder)
        let mount = try TestMount(path, in: folder)
        let daemon = try mount.daemon()
        try useWhileEnding(mount, daemon)
        #expect(eventually { !isRunning(daemon) })
        mount.wasUnmounted()
        #expect(try QemuImg.check(path).status == 0)
        try QemuImg.io(path, ["read -q -P 0x62 2M 4k"])
    }

    private func useWhileEnding(_ mount: TestMount, _ daemon: pid_t) throws {
        let file = try mount.open()
        try file.write([UInt8](repeating: 0x62, count: 4096), at: 2.MiB)
        kill(daemon, SIGTERM)
        usleep(300_000)
        #expect(isRunning(daemon))
        #expect(try holds(file, 2.MiB..<2.MiB + 4096, 0x62))
    }

    @Test("umount of a busy mount fails and says who keeps it busy")
    func busy() throws {
        let folder = try TemporaryDirectory()
        let mount = try TestMount(try image(folder), in: folder)
        try whileOpen(mount)
        try mount.unmount()
    }

    private func whileOpen(_ mount: TestMount) throws {
        let file = try mount.open()
        let result = try qcowfs("umount", mount.mountpoint)
        expectRefusal(result, naming: "\(getpid())")
        #expect(try holds(file, 0..<512, 0xA1))
    }

    @Test("umount names the loop device that keeps a mount busy", .enabledWhereLoopable)
    func busyLoop() throws {
        let folder = try TemporaryDirectory()
        let mount = try TestMount(try image(folder), in: folder)
        let loop = try LoopDevice(mount.disk)
        expectRefusal(try qcowfs("umount", mount.mountpoint), naming: loop.path)
        try loop.detach()
        try mount.unmount()
    }

    /// Stops the daemon of a mount while `body` runs.
    private func whileStopped(_ body: (TestMount, pid_t) throws -> Void) throws {
        let folder = try TemporaryDirectory()
        let mount = try TestMount(try image(folder), in: folder)
        let daemon = try mount.daemon()
        kill(daemon, SIGSTOP)
        let outcome = Result { try body(mount, daemon) }
        kill(daemon, SIGCONT)
        try outcome.get()
        try mount.unmount()
    }

    @Test("umount does not wait for a daemon that is stopped")
    func stopped() throws {
        try whileStopped { mount, daemon in
            expectRefusal(
                try qcowfs("umount", "--timeout", "1", mount.mountpoint, timeout: 20),
                naming: "does not answer", "\(daemon)", "kill")
        }
    }

    @Test("nobody waits for a daemon that is stopped, however many have asked it before")
    func stoppedAndAsked() throws {
        try whileStopped { mount, _ in
            // Each question stays in the daemon's queue, whoever asked it has gone or not.
            let asking = try (0..<40).map { _ in
                try Command.start([TestEnvironment.program, "stats", mount.mountpoint])
            }
            for question in asking { #expect(try question.wait(timeout: 20).status == 1) }
            expectRefusal(
                try qcowfs("umount", "--timeout", "1", mount.mountpoint, timeout: 20),
                naming: "does not answer", "kill")
            #expect(try qcowfs("list", timeout: 20).output.contains(mount.mountpoint))
        }
    }

    @Test("umount refuses what is not mounted")
    func notMounted() throws {
        let folder = try TemporaryDirectory()
        expectRefusal(try qcowfs("umount", folder.path), naming: folder.path, "not mounted")
    }

    @Test("--foreground stays until it is unmounted, and --pid-file names it")
    func foreground() throws {
        let folder = try TemporaryDirectory()
        let mountpoint = try folder.directory("mnt")
        let pidFile = folder.file("pid")
        let running = try Command.start([
            TestEnvironment.program, "mount", "--foreground", "--pid-file", pidFile,
            try image(folder), mountpoint,
        ])
        #expect(eventually { TestMount.isMountpoint(mountpoint) })
        #expect(eventually { FileManager.default.fileExists(atPath: pidFile) })
        let written = try String(contentsOfFile: pidFile, encoding: .utf8)
        #expect(written.trimmingCharacters(in: .whitespacesAndNewlines) == "\(running.pid)")
        // The daemon is this process's child here, so umount cannot see it gone before it is
        // waited for; give it both at once.
        let unmounting = try Command.start([TestEnvironment.program, "umount", mountpoint])
        #expect(try running.wait(timeout: 20).status == 0)
        #expect(try unmounting.wait(timeout: 20).status == 0)
    }

    @Test("a mount whose caller is ended meanwhile does not stay, or has begun")
    func callerEnded() throws {
        let folder = try TemporaryDirectory()
        let path = try image(folder)
        let mountpoint = try folder.directory("mnt")
        for round in 0..<30 {
            let running = try Command.start([TestEnvironment.program, "mount", path, mountpoint])
            usleep(UInt32(round * 700))
            kill(running.pid, SIGINT)
            if try running.wait(timeout: 20).status == 0 {
                try Command.require([TestEnvironment.program, "umount", mountpoint], timeout: 20)
            } else {
                #expect(eventually { !TestMount.isMountpoint(mountpoint) }, "round \(round)")
            }
        }
    }

    @Test("list names an image whose name has a newline")
    func listedNewline() throws {
        let folder = try TemporaryDirectory()
        let mount = try TestMount(try image(folder, "a\nb=c.qcow2"), in: folder)
        let json = try qcowfs("list", "--json")
        #expect(json.output.contains("/a\\nb=c.qcow2\""), "\(json)")
        try mount.unmount()
    }

    @Test("list shows this user's mounts")
    func list() throws {
        let folder = try TemporaryDirectory()
        let path = try image(folder)
        let mount = try TestMount(path, in: folder)
        let listed = try qcowfs("list")
        #expect(listed.status == 0 && listed.output.contains(mount.mountpoint), "\(listed)")
        #expect(listed.output.contains("\(try mount.daemon())"))
        let json = try qcowfs("list", "--output", "json")
        #expect(json.output.contains("disk.qcow2"), "\(json)")
        try mount.unmount()
        #expect(!(try qcowfs("list").output.contains(mount.mountpoint)))
    }

    @Test("the daemon commits by itself within its interval")
    func backgroundCommit() throws {
        let folder = try TemporaryDirectory()
        let path = try image(folder)
        let mount = try TestMount(path, in: folder, options: ["--commit-interval", "1"])
        let daemon = try mount.daemon()
        try write(mount, 0x71, at: 5.MiB, sync: false)
        usleep(2_500_000)
        kill(daemon, SIGKILL)
        #expect(eventually { !isRunning(daemon) })
        _ = try qcowfs("umount", mount.mountpoint)
        mount.wasUnmounted()
        try QemuImg.io(path, ["read -q -P 0x71 5M 64k"])
        let check = try QemuImg.check(path)
        #expect(check.status == 0 || check.status == 3, "\(check)")
    }
}
