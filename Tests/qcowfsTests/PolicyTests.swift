import Glibc
import TestSupport
import Testing

/// Which other files an image may make the program open.
@Suite("Open policy", .serialized, .enabledWhereMountable)
struct PolicyTests {
    /// A folder with `images/top.qcow2` over `name`, and `base.qcow2` beside `images`.
    private func overlay(_ name: String, format: String? = "qcow2") throws -> (
        folder: TemporaryDirectory, image: String
    ) {
        let folder = try TemporaryDirectory()
        _ = try folder.directory("images")
        try makeImage(folder.file("base.qcow2"))
        try makeImage(folder.file("images/inside.qcow2"))
        symlink(folder.file("base.qcow2"), folder.file("images/link.qcow2"))
        symlink(folder.file("images/inside.qcow2"), folder.file("images/inner.qcow2"))
        mkfifo(folder.file("images/pipe"), 0o600)
        var image = ImageBuilder(byteCount: 8.MiB)
        image.backingName = name.replacing("FOLDER", with: folder.path)
        if let format { image.extensions = [(0xe279_2aca, Array(format.utf8))] }
        return (folder, try folder.write(image.build(), to: "images/top.qcow2"))
    }

    @Test(
        "Trap 18: refuses a backing file outside of the image's directory, however it is named",
        arguments: [
            "FOLDER/base.qcow2", "../base.qcow2", "link.qcow2", "./../base.qcow2", "/etc/passwd",
        ])
    func outside(name: String) throws {
        let (folder, image) = try overlay(name)
        try expectMountRefused(
            image, in: folder, naming: ["top.qcow2", "--allow-path", "--trust-paths"])
    }

    @Test(
        "Trap 18: refuses what is no plain local path",
        arguments: [
            "json:{\"driver\":\"qcow2\"}", "nbd://127.0.0.1:10809/x", "file:inside.qcow2",
            "nbd:unix:/tmp/x", "https://example.org/x",
        ])
    func schemes(name: String) throws {
        let (folder, image) = try overlay(name)
        try expectMountRefused(image, in: folder, naming: ["top.qcow2"])
        try expectMountRefused(image, in: folder, options: ["--trust-paths"], naming: ["top.qcow2"])
    }

    @Test(
        "looks for files beside a link to an image, as QEMU does",
        arguments: [[], ["--overlay", "tmp"]])
    func links(options: [String]) throws {
        let folder = try TemporaryDirectory()
        for (name, byte) in [("a", 1), ("b", 2)] {
            _ = try folder.directory(name)
            try makeImage(
                folder.file("\(name)/base.qcow2"), commands: ["write -q -P \(byte) 0 64k"])
        }
        try QemuImg.create(folder.file("b/top.qcow2"), backing: "base.qcow2")
        let link = folder.file("a/link.qcow2")
        symlink("../b/top.qcow2", link)
        try QemuImg.io(link, ["read -q -P 1 0 64k"])
        let mount = try TestMount(link, in: folder, options: options)
        #expect(mount.disk.hasSuffix("/link.raw"))
        #expect(try holds(mount.open(O_RDONLY), 0..<64.KiB, 1))
    }

    @Test("refuses a device and a FIFO as backing files", arguments: ["pipe", "/dev/zero"])
    func specialFiles(name: String) throws {
        let (folder, image) = try overlay(name, format: "raw")
        try expectMountRefused(image, in: folder, naming: ["top.qcow2"])
        try expectMountRefused(
            image, in: folder, options: ["--trust-paths"], naming: ["top.qcow2"])
    }

    @Test(
        "opens what lies inside, by relative, absolute and linked names",
        arguments: [
            "inside.qcow2", "./inside.qcow2", "FOLDER/images/inside.qcow2", "inner.qcow2",
            "../images/inside.qcow2",
        ])
    func inside(name: String) throws {
        let (folder, image) = try overlay(name)
        let mount = try TestMount(image, in: folder)
        #expect(try holds(mount.open(O_RDONLY), 0..<128.KiB, 0xA1))
        try mount.unmount()
    }

    @Test("--allow-path widens, --trust-paths opens")
    func widened() throws {
        let (folder, image) = try overlay("../base.qcow2")
        for options in [["--allow-path", folder.path], ["--trust-paths"]] {
            let mount = try TestMount(image, in: folder, options: options)
            #expect(try holds(mount.open(O_RDONLY), 0..<128.KiB, 0xA1))
            try mount.unmount()
        }
        let elsewhere = try folder.directory("elsewhere")
        try expectMountRefused(
            image, in: folder, options: ["--allow-path", elsewhere], naming: ["top.qcow2"])
    }

    @Test("Trap 17: a raw backing file that looks like qcow2 stays raw when the header says raw")
    func obeysFormat() throws {
        let (folder, image) = try overlay("inside.qcow2", format: "raw")
        let mount = try TestMount(image, in: folder)
        #expect(try mount.open(O_RDONLY).read(0..<4) == [0x51, 0x46, 0x49, 0xFB])
        try mount.unmount()
    }

    @Test("a backing file without a format is probed by its magic")
    func probes() throws {
        let (folder, image) = try overlay("inside.qcow2", format: nil)
        let mount = try TestMount(image, in: folder)
        #expect(try holds(mount.open(O_RDONLY), 0..<4096, 0xA1))
        try mount.unmount()
    }

    @Test("a missing backing file and a chain that loops are refused by name")
    func brokenChains() throws {
        let (folder, image) = try overlay("gone.qcow2")
        try expectMountRefused(image, in: folder, naming: ["gone.qcow2"])
        let (looping, top) = try overlay("top.qcow2")
        try expectMountRefused(top, in: looping, naming: ["top.qcow2"])
    }

    @Test("info opens no other file")
    func infoStaysHome() throws {
        let (folder, image) = try overlay("/nowhere/at-all.qcow2")
        let result = try withExtendedLifetime(folder) { try qcowfs("info", image) }
        #expect(result.status == 0 && result.output.contains("/nowhere/at-all.qcow2"), "\(result)")
    }
}
