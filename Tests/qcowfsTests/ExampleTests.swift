import Foundation
import TestSupport
import Testing

/// Each example does what it says, with images that QEMU has made.
@Suite("Examples", .needsQemuImg)
struct ExampleTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
        try makeImage(image, size: 64.MiB)
    }

    /// The program that an example is built as, beside the one under test.
    private func program(_ name: String) -> String {
        String(TestEnvironment.program.dropLast("qcowfs".count)) + name
    }

    @Test("sparse-copy copies an image, holes left out")
    func sparseCopy() throws {
        let copy = folder.file("copy.qcow2")
        try Command.require(program("sparse-copy"), image, copy)
        try Command.require("qemu-img", "compare", image, copy)
        try Command.require("qemu-img", "check", copy)
        #expect(try TestFile(copy, O_RDONLY).byteCount() < 2.MiB)
    }

    @Test("raw-disk makes a sparse raw disk, of a snapshot too, or nothing")
    func rawDisk() throws {
        let (raw, then) = (folder.file("disk.raw"), folder.file("then.raw"))
        try QemuImg.snapshot(image, create: "then")
        try Command.require(program("raw-disk"), image, then)
        try QemuImg.io(image, ["write -q -P 7 5M 300k"])
        #expect(try Command.require(program("raw-disk"), image, raw).contains("\(64.MiB) bytes"))
        #expect(try QemuImg.difference(raw, image) == nil)
        #expect(try Int(TestFile(raw, O_RDONLY).status().st_blocks) * 512 < 2.MiB)
        try Command.require(program("raw-disk"), image, raw, "then")
        try Command.require("cmp", raw, then)
        let missing = try Command.run([program("raw-disk"), image, folder.file("x"), "never"])
        #expect(missing.status == 1 && missing.output.contains("never"))
        #expect(access(folder.file("x"), F_OK) != 0)
    }

    @Test("inspect-image tells format, snapshots, bitmaps, where bytes come from, and findings")
    func inspectImage() throws {
        let top = folder.file("top.qcow2")
        try QemuImg.create(top, backing: "disk.qcow2")
        try QemuImg.io(top, ["write -q -P 9 8M 128k", "write -q -z 0 64k"])
        try QemuImg.snapshot(top, create: "first")
        try Command.require("qemu-img", "bitmap", "--add", top, "marks")
        let said = try Command.require(program("inspect-image"), top)
        for words in [
            "disk: \(64.MiB) bytes", "version 3, clusters of 65536 bytes, deflate",
            "backing file: \(image)", "snapshot 1: first", "bitmap: marks",
            "\(128.KiB) of its own, 0 compressed, \(128.KiB) of backing files",
            "\(64.MiB - 256.KiB) zeros", "check: 0 errors, 0 leaked clusters",
        ] {
            #expect(said.contains(words), "\(words): \(said)")
        }
    }

    @Test("mount-image shows an image as a raw file until it is unmounted", .enabledWhereMountable)
    func mountImage() throws {
        let mountpoint = folder.file("mnt")
        mkdir(mountpoint, 0o755)
        let running = try Command.start([program("mount-image"), image, mountpoint])
        let mount = TestMount(existing: image, on: mountpoint)
        #expect(eventually { running.printed.contains("disk.raw is ready") }, "\(running.printed)")
        try TestFile(mount.disk, O_RDWR).write([UInt8](repeating: 5, count: 4096), at: 3.MiB)
        try mount.unmount()
        #expect(try running.wait(timeout: 20).status == 0)
        try QemuImg.io(image, ["read -q -P 5 3M 4k", "read -q -P 0xA2 1M 64k"])
        #expect(try QemuImg.check(image).status == 0)
    }
}
