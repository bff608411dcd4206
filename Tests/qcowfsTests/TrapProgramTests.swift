import Glibc
import TestSupport
import Testing

/// Traps 13, 17 and 20, which only a whole program falls into.
@Suite("Traps of the program", .serialized, .enabledWhereMountable)
struct TrapProgramTests {
    /// A number that would take more memory than there is, were it believed.
    struct Bomb: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let put: @Sendable (inout [UInt8]) -> Void

        init(_ words: String, _ put: @escaping @Sendable (inout [UInt8]) -> Void) {
            (testDescription, self.put) = (words, put)
        }
    }

    private static func snapshots(_ bytes: [UInt8]) -> Int {
        Int(bytes.number(at: 64, as: UInt64.self))
    }

    /// The bitmap directory: the first extension's fourth number.
    private static func directory(_ bytes: [UInt8]) -> Int {
        Int(bytes.number(at: 112 + 8 + 16, as: UInt64.self))
    }

    static let bombs = [
        Bomb("L1 entries") { $0.put(UInt32.max >> 1, at: 36) },
        Bomb("as many L1 entries as there may be") { $0.put(UInt32(4 << 20), at: 36) },
        Bomb("refcount table clusters") { $0.put(UInt32.max >> 1, at: 56) },
        Bomb("snapshots") { $0.put(UInt32.max >> 1, at: 60) },
        Bomb("as many snapshots as there may be") { $0.put(UInt32(65536), at: 60) },
        Bomb("a snapshot's L1 entries") { $0.put(UInt32.max >> 1, at: snapshots($0) + 8) },
        Bomb("a snapshot's extra data") { $0.put(UInt32.max >> 1, at: snapshots($0) + 36) },
        Bomb("an extension's length") { $0.put(UInt32.max >> 1, at: 112 + 4) },
        Bomb("bitmaps") { $0.put(UInt32.max >> 1, at: 112 + 8) },
        Bomb("the bitmap directory's length") { $0.put(UInt64.max >> 1, at: 112 + 16) },
        Bomb("a bitmap's table") { $0.put(UInt32.max >> 1, at: directory($0) + 8) },
        Bomb("a bitmap's extra data") { $0.put(UInt32.max >> 1, at: directory($0) + 20) },
        Bomb("a backing file's name") {
            $0.put(UInt64(1024), at: 8)
            $0.put(UInt32.max >> 1, at: 16)
        },
        Bomb("the disk's size") { $0.put(UInt64.max >> 1, at: 24) },
    ]

    /// An image in `folder` with one such number.
    static func image(with bomb: Bomb, in folder: TemporaryDirectory) throws -> String {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.fill(0x11, guestCluster: 0)
        builder.snapshot("kept")
        builder.bitmap("bits")
        var bytes = builder.build()
        bomb.put(&bytes)
        let image = try folder.write(bytes, to: "disk.qcow2")
        // A file that is as long as the numbers say, without having the bytes.
        try TestFile(image, O_RDWR).truncate(to: 1 << 36)
        return image
    }

    @Test("Trap 13: no number of an image makes the program take a gigabyte", arguments: bombs)
    func memory(_ bomb: Bomb) throws {
        let folder = try TemporaryDirectory()
        let image = try Self.image(with: bomb, in: folder)
        let mountpoint = try folder.directory("mnt")
        for words in [["info"], ["check"], ["mount"], ["mount", "-r"]] {
            let mounts = words[0] == "mount"
            let result = try Command.run(
                [
                    "bash", "-c", "ulimit -v 1048576; exec \"$0\" \"$@\"", TestEnvironment.program,
                ] + words + [image] + (mounts ? [mountpoint] : []), timeout: 60)
            #expect(result.status <= 3, "\(result)")
            if result.status == 1 { expectRefusal(result) }
            if mounts && result.status == 0 { _ = try qcowfs("umount", mountpoint) }
        }
    }

    @Test("Trap 17: a guest that writes a qcow2 header to its raw disk does not make it an image")
    func guestHeader() throws {
        let folder = try TemporaryDirectory()
        var secret = ImageBuilder(byteCount: 1.MiB)
        secret.backingName = "secret.raw"
        let header = Array(secret.build()[..<4096])
        _ = try folder.write([UInt8](repeating: 0x5E, count: 1.MiB), to: "secret.raw")
        _ = try folder.write(header + [UInt8](repeating: 0, count: 1.MiB - 4096), to: "disk.raw")
        var overlay = ImageBuilder(byteCount: 1.MiB)
        overlay.backingName = "disk.raw"
        // Without a format the guest's header is believed, but it opens no further file.
        let guessing = try folder.write(overlay.build(), to: "guessing.qcow2")
        try expectMountRefused(guessing, in: folder, naming: ["secret.raw", "guessed"])
        // With the format the disk is what it always was.
        overlay.extensions = [(0xe279_2aca, Array("raw".utf8))]
        let knowing = try folder.write(overlay.build(), to: "knowing.qcow2")
        let mount = try TestMount(knowing, in: folder)
        #expect(try mount.open(O_RDONLY).read(0..<4096) == header)
        // Nor does the top image's own content matter, once it is written.
        try mount.open().write(header, at: 65536)
        try mount.unmount()
        try QemuImg.io(knowing, ["read -q 0 4096"])
        #expect(try QemuImg.check(knowing).status == 0)
    }

    @Test("Trap 17: a format that had to be guessed is warned of")
    func warnsOfGuess() throws {
        let folder = try TemporaryDirectory()
        _ = try folder.write([UInt8](repeating: 0xBB, count: 1.MiB), to: "base.raw")
        var overlay = ImageBuilder(byteCount: 1.MiB)
        overlay.backingName = "base.raw"
        let image = try folder.write(overlay.build(), to: "top.qcow2")
        let log = folder.file("log")
        let mount = try TestMount(image, in: folder, options: ["--log-file", log])
        #expect(try holds(mount.open(O_RDONLY), 0..<4096, 0xBB))
        try mount.unmount()
        let lines = try TestFile(log, O_RDONLY).read(0..<10_000)
        let words = String(decoding: lines, as: UTF8.self)
        #expect(words.contains("base.raw") && words.contains("raw"), "\(words)")
    }

    @Test(
        "Trap 20: a relative backing name starts from the overlay, wherever the program was started"
    )
    func otherDirectory() throws {
        let folder = try TemporaryDirectory()
        let (images, elsewhere) = (
            try folder.directory("images"), try folder.directory("elsewhere")
        )
        try makeImage(images + "/base.qcow2")
        try QemuImg.create(images + "/top.qcow2", backing: images + "/base.qcow2")
        try Command.require(
            "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2",
            images + "/top.qcow2")
        // A file of that name where the program runs, with other bytes.
        try makeImage(elsewhere + "/base.qcow2", commands: ["write -q -P 0xEE 0 1M"])
        let mountpoint = try folder.directory("mnt")
        for (place, path) in [
            (elsewhere, "../images/top.qcow2"), (elsewhere, images + "/top.qcow2"),
            (elsewhere, "./../images/../images/top.qcow2"), (images, "top.qcow2"),
        ] {
            try Command.shell("cd \(place); '\(TestEnvironment.program)' mount \(path) ../mnt")
            let disk = mountpoint + "/top.raw"
            #expect(try holds(TestFile(disk, O_RDONLY), 0..<128.KiB, 0xA1), "\(path)")
            try Command.require(TestEnvironment.program, "umount", mountpoint)
        }
    }
}
