import Glibc
import TestSupport
import Testing

/// Locks between this program and QEMU, on the image and on its backing files.
@Suite("Locks", .serialized, .enabledWhereMountable)
struct LockTests {
    private func chain() throws -> (folder: TemporaryDirectory, top: String, base: String) {
        let folder = try TemporaryDirectory()
        let base = folder.file("base.qcow2")
        let top = folder.file("top.qcow2")
        try makeImage(base)
        try QemuImg.create(top, backing: "base.qcow2")
        return (folder, top, base)
    }

    private func qemu(_ path: String, flags: [String] = []) throws -> Int32 {
        try Command.run(["qemu-io", "-f", "qcow2"] + flags + ["-c", "read -q 0 512", path]).status
    }

    @Test("QEMU refuses an image that is mounted read-write, and has it again after umount")
    func keepsQEMUOut() throws {
        let (folder, top, _) = try chain()
        let mount = try TestMount(top, in: folder)
        #expect(try qemu(top) != 0)
        #expect(try qemu(top, flags: ["-r"]) != 0)
        #expect(try Command.run(["qemu-img", "info", top]).status != 0)
        #expect(try Command.run(["qemu-img", "snapshot", "-c", "no", top]).status != 0)
        try mount.unmount()
        #expect(try qemu(top) == 0)
    }

    @Test("QEMU may read the backing file of a mounted image, not write it")
    func keepsWritersFromBacking() throws {
        let (folder, top, base) = try chain()
        let mount = try TestMount(top, in: folder)
        #expect(try qemu(base) != 0)
        #expect(try qemu(base, flags: ["-r"]) == 0)
        try mount.unmount()
        #expect(try qemu(base) == 0)
    }

    @Test("both may read at once")
    func sharesReading() throws {
        let (folder, top, _) = try chain()
        let mount = try TestMount(top, in: folder, options: ["--read-only"])
        #expect(try qemu(top, flags: ["-r"]) == 0)
        #expect(try qemu(top) != 0)
        try mount.unmount()
        try whileQEMUHas(top, flags: ["-r"]) { _ in
            try TestMount(top, in: folder, options: ["--read-only"]).unmount()
        }
    }

    @Test("a mount is refused, and names the holder, while QEMU has the image")
    func isKeptOut() throws {
        let (folder, top, _) = try chain()
        try whileQEMUHas(top) { _ in
            try expectMountRefused(top, in: folder, naming: ["top.qcow2", "qemu-io"])
            try expectMountRefused(
                top, in: folder, options: ["--read-only"], naming: ["top.qcow2"])
        }
        try whileQEMUHas(top, flags: ["-r"]) { _ in
            try expectMountRefused(top, in: folder, naming: ["top.qcow2"])
        }
    }

    @Test("a mount is refused while QEMU writes to its backing file")
    func isKeptOutOfBacking() throws {
        let (folder, top, base) = try chain()
        try whileQEMUHas(base) { _ in
            try expectMountRefused(top, in: folder, naming: ["base.qcow2"])
        }
    }

    @Test("a mount that hangs holds up nobody who changes another")
    func hangsAlone() throws {
        let folder = try TemporaryDirectory()
        let mounts = try ["stopped", "other"].map { name in
            let image = folder.file("\(name).qcow2")
            try makeImage(image)
            return try TestMount([image], on: folder.directory(name))
        }
        let file = try mounts[0].open()
        // What the kernel knew of the file's attributes is old now.
        try file.write([1, 2, 3], at: 0)
        let daemon = try mounts[0].daemon()
        kill(daemon, SIGSTOP)
        let change = Result {
            try Command.require(
                [TestEnvironment.program, "snapshot", "-c", "new", mounts[1].image], timeout: 20)
        }
        kill(daemon, SIGCONT)
        _ = try change.get()
        try mounts[1].unmount()
        #expect(try QemuImg.info(mounts[1].image).snapshots.map(\.name) == ["new"])
    }

    @Test("--force-share reads while another program writes")
    func forceShare() throws {
        let (folder, top, _) = try chain()
        try whileQEMUHas(top) { _ in
            let mount = try TestMount(top, in: folder, options: ["--force-share"])
            #expect(try holds(mount.open(O_RDONLY), 0..<4096, 0xA1))
            try mount.unmount()
        }
    }

    @Test("a second mount of the same image is refused, whatever it is called")
    func mountsOnce() throws {
        let (folder, top, _) = try chain()
        let (symbolic, hard) = (folder.file("symbolic.qcow2"), folder.file("hard.qcow2"))
        symlink(top, symbolic)
        link(top, hard)
        let mount = try TestMount(top, in: folder)
        let other = try folder.directory("other")
        for name in [top, symbolic, hard] {
            // Sooner than one waits for a daemon that is closing.
            expectRefusal(
                try qcowfs("mount", name, other, timeout: 8), naming: "\(try mount.daemon())")
        }
        try mount.unmount()
    }

    @Test("an image that is named twice is not said to be held by somebody")
    func namedTwice() throws {
        let (folder, top, _) = try chain()
        let other = folder.file("other.qcow2")
        link(top, other)
        let mountpoint = try folder.directory("mnt")
        expectRefusal(try qcowfs("mount", top, other, mountpoint), naming: "this process itself")
        expectRefusal(
            try qcowfs("convert", "-O", "qcow2", top, other), naming: "this process itself")
    }
}
