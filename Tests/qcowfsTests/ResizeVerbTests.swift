import Glibc
import TestSupport
import Testing

/// `resize`: where it cannot be done, and on images that are mounted.
@Suite("Changing the size of a disk", .needsQemuImg)
struct ResizeVerbTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    @Test(
        "a disk that finds no room to grow keeps its bytes, wherever its new clusters were to lie",
        .enabledWhereLoopable, arguments: ["metadata", "falloc", "full"], [512, 65536])
    func noRoomForScatteredClusters(preallocation: String, clusterByteCount: Int) throws {
        let small = try folder.directory("small")
        try Command.require("mount", "-t", "tmpfs", "-o", "size=20m", "none", small)
        defer { _ = try? Command.run(["umount", small]) }
        let image = small + "/disk.qcow2"
        // The old L1 table's place is the first that new clusters get.
        try makeImage(
            image, size: 26.KiB, options: ["cluster_size=\(clusterByteCount)"],
            commands: ["write -q -P 0x6d 0 26k"])
        for room in [64.KiB, 200.KiB, 1.MiB] {
            let fill = small + "/fill"
            try Command.shell(
                "head -c $(($(df --output=avail -B1 \(small) | tail -1) - \(room))) /dev/zero "
                    + "> \(fill)")
            expectRefusal(
                try qcowfs(
                    "resize", "--preallocation", preallocation, image,
                    clusterByteCount == 512 ? "+60M" : "+8G"),
                naming: "no space")
            unlink(fill)
            #expect(try QemuImg.info(image).byteCount == 26.KiB)
            let check = try QemuImg.check(image)
            #expect(check.status == 0, "\(check)")
            try QemuImg.io(image, ["read -q -P 0x6d 0 26k"])
        }
    }

    @Test(
        "a disk that finds no room to grow into is as long as before, and nothing leaks",
        .enabledWhereLoopable, arguments: ["falloc", "full"], [false, true])
    func noRoom(preallocation: String, isMounted: Bool) throws {
        let small = try folder.directory("small")
        try Command.require("mount", "-t", "tmpfs", "-o", "size=20m", "none", small)
        defer { _ = try? Command.run(["umount", small]) }
        let image = small + "/disk.qcow2"
        try makeImage(image, size: 100.MiB)
        let mount = isMounted ? try TestMount(image, in: folder) : nil
        expectRefusal(
            try qcowfs("resize", "--preallocation", preallocation, image, "+100M"),
            naming: "no space")
        if let mount {
            #expect(try mount.open().byteCount() == 100.MiB)
            try mount.open().write([7], at: 50.MiB)
            try mount.unmount()
        }
        #expect(try QemuImg.info(image).byteCount == 100.MiB)
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
        try QemuImg.io(image, ["read -q -P 0xA1 0 128k", "read -q -P 0xA2 1M 64k"])
        #expect(try Int(TestFile(image, O_RDONLY).status().st_blocks) * 512 < 2.MiB)
    }

    @Test("a disk does not become smaller unasked, mounted or not", .enabledWhereMountable)
    func shrinking() throws {
        try makeImage(image)
        let sum = try Command.require("sha256sum", image)
        expectRefusal(try qcowfs("resize", image, "-1M"), naming: "disk.qcow2", "--shrink")
        #expect(try Command.require("sha256sum", image) == sum)
        let mount = try TestMount(image, in: folder)
        expectRefusal(try qcowfs("resize", image, "-1M"), naming: "disk.qcow2", "--shrink")
        #expect(try mount.open().byteCount() == 8.MiB)
        try mount.unmount()
    }

    @Test("what lies below a mounted image is refused as its backing file", .enabledWhereMountable)
    func backingFile() throws {
        let top = folder.file("top.qcow2")
        try makeImage(image)
        try QemuImg.create(top, backing: "disk.qcow2")
        for options in [[], ["--read-only"]] {
            let mount = try TestMount(top, in: folder, options: options)
            for words in [["resize", image, "+1M"], ["snapshot", "-c", "new", image]] {
                expectRefusal(
                    try Command.run([TestEnvironment.program] + words), naming: "disk.qcow2: ",
                    "the backing file of", "top.qcow2", "process \(try mount.daemon())")
            }
            try mount.unmount()
        }
    }
}
