import Foundation
import TestSupport
import Testing

/// Conversions on a file system in which files can share space: xfs, made with reflinks.
@Suite(
    "Copies that share space",
    .enabled(
        if: TestEnvironment.canLoop && TestEnvironment.has("mkfs.xfs", "xfs_io"),
        "loop devices, root or xfsprogs is missing"), .needsQemuImg)
struct SharedSpaceTests {
    let folder: TemporaryDirectory
    private let loop: LoopDevice
    private let mount: FileSystemMount

    init() throws {
        folder = try TemporaryDirectory()
        let file = folder.file("xfs")
        try Command.require("truncate", "-s", "160G", file)
        try Command.require("mkfs.xfs", "-q", "-m", "reflink=1", "-l", "size=64m", file)
        loop = try LoopDevice(file)
        mount = try FileSystemMount(loop.path, on: folder.file("files"))
    }

    private func path(_ name: String) -> String { mount.path + "/" + name }

    private func convert(_ words: String...) throws {
        try Command.require([TestEnvironment.program, "convert"] + words)
    }

    /// Bytes of the file system that are in use, everything written.
    private func usedByteCount() throws -> Int {
        try Command.require("sync", "-f", mount.path)
        let words = try Command.require("df", "-B1", "--output=used", mount.path)
        return try #require(
            words.split(separator: "\n").last.flatMap { line in
                Int(line.filter(\.isNumber))
            })
    }

    /// Whether `body` takes no more of the file system than what metadata needs.
    private func isFree(_ body: () throws -> Void) throws -> Bool {
        let before = try usedByteCount()
        try body()
        return try usedByteCount() - before < 2.MiB
    }

    /// 40 MiB of random bytes between holes, and a disk that ends within a block.
    private func fill(_ image: String) throws {
        try Command.require(
            "dd", "if=/dev/urandom", "of=\(path("random"))", "bs=1M", "count=20", "status=none")
        try QemuImg.io(
            image,
            ["write -q -s \(path("random")) 3M 20M", "write -q -s \(path("random")) 40M 20M"])
    }

    @Test("100 GiB of an uncompressed image become a raw disk without a copy, at once")
    func large() throws {
        try QemuImg.create(
            path("disk.qcow2"), size: 100 << 30,
            options: [
                "data_file=\(path("disk.data"))", "data_file_raw=on", "preallocation=metadata",
            ])
        // A file of 100 GiB with data everywhere, which takes 256 MiB.
        try Command.require(
            "dd", "if=/dev/urandom", "of=\(path("part"))", "bs=1M", "count=256", "status=none")
        let parts = (0..<400).flatMap { ["-c", "reflink \(path("part")) 0 \($0 * 256)m 256m"] }
        try Command.require(["xfs_io"] + parts + [path("disk.data")])
        let start = Date()
        #expect(try isFree { try convert(path("disk.qcow2"), path("disk.raw")) })
        let seconds = Date().timeIntervalSince(start)
        #expect(seconds < 5, "\(seconds) s")
        let status = try TestFile(path("disk.raw"), O_RDONLY).status()
        #expect(Int(status.st_size) == 100 << 30 && Int(status.st_blocks) * 512 >= 100 << 30)
        try Command.require(
            "cmp", "-n", "\(300 << 20)", "-i", "\(50 << 30)", path("disk.raw"), path("disk.data"))
    }

    @Test(
        "every kind of image becomes an equal raw disk and an equal image",
        arguments: [
            "cluster_size=64k", "cluster_size=512", "cluster_size=4k", "cluster_size=2M",
            "compat=0.10", "extended_l2=on", "data_file=DATA", "preallocation=metadata",
            "preallocation=falloc",
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
        ])
    func kinds(options: String) throws {
        let image = path("disk.qcow2")
        let isEncrypted = options.hasPrefix("encrypt")
        let options = options.replacing("DATA", with: path("data"))
        let plain = path("plain.qcow2")
        try QemuImg.create(plain, size: 64.MiB + 512)
        try fill(plain)
        try QemuImg.io(plain, ["write -q -P 5 63M 1049088", "write -q -z 50M 1M"])
        try Command.require(
            ["qemu-img", "convert", "-O", "qcow2", "-o", options]
                + (isEncrypted ? ["--object", "secret,id=key,data=secret"] : []) + [plain, image])
        try Command.shell("printf secret > \(path("key"))")
        let words = isEncrypted ? ["--passphrase-file", path("key")] : []
        let (raw, copy) = (path("disk.raw"), path("copy.qcow2"))
        try Command.require([TestEnvironment.program, "convert"] + words + [image, raw])
        #expect(try QemuImg.difference(raw, plain) == nil)
        try Command.require(
            [TestEnvironment.program, "convert", "-O", "qcow2"] + words + [image, copy])
        #expect(try Command.run(["qemu-img", "compare", plain, copy]).status == 0)
        #expect(try QemuImg.check(copy).status == 0)
    }

    @Test("an image and a raw disk share what is no zeros, both ways")
    func bothWays() throws {
        let (image, raw, copy) = (path("disk.qcow2"), path("disk.raw"), path("copy.qcow2"))
        try QemuImg.create(image, size: 64.MiB)
        try fill(image)
        #expect(try isFree { try convert(image, raw) })
        #expect(try QemuImg.difference(raw, image) == nil)
        try TestFile(raw, O_RDWR).write([UInt8](repeating: 0, count: 2.MiB), at: 30.MiB)
        #expect(try isFree { try convert("-O", "qcow2", raw, copy) })
        #expect(try Command.run(["qemu-img", "compare", raw, copy]).status == 0)
        #expect(try QemuImg.check(copy).status == 0)
        #expect(try !QemuImg.dataRanges(copy).contains { $0.contains(31.MiB) })
        #expect(try isFree { try convert("-O", "qcow2", copy, raw) })
        #expect(try Command.run(["qemu-img", "compare", raw, copy]).status == 0)
    }

    @Test("what is written later to one of them leaves the other as it is")
    func independence() throws {
        let (image, raw) = (path("disk.qcow2"), path("disk.raw"))
        try QemuImg.create(image, size: 64.MiB)
        try fill(image)
        try convert(image, raw)
        try Command.require("cp", "--reflink=never", raw, path("before"))
        try QemuImg.io(image, ["write -q -P 9 3M 1M", "discard -q 40M 1M"])
        try Command.require("cmp", raw, path("before"))
        try TestFile(raw, O_RDWR).write([1, 2, 3], at: 5.MiB)
        try QemuImg.io(image, ["write -q -s \(path("random")) 3M 20M"])
        try QemuImg.io(image, ["write -q -s \(path("random")) 40M 20M"])
        #expect(try QemuImg.difference(path("before"), image) == nil)
    }

    @Test("overlays, snapshots, compressed clusters and -S 0 come out right")
    func mixtures() throws {
        let (base, image, raw) = (path("base.qcow2"), path("disk.qcow2"), path("disk.raw"))
        try QemuImg.create(base, size: 64.MiB)
        try fill(base)
        try Command.require(
            "qemu-img", "convert", "-c", "-O", "qcow2", base, path("compressed.qcow2"))
        try QemuImg.create(image, size: 80.MiB, backing: "compressed.qcow2")
        try QemuImg.io(image, ["write -q -s \(path("random")) 10M 4M", "write -q -P 3 70M 300k"])
        try QemuImg.snapshot(image, create: "then")
        try convert(image, raw)
        #expect(try QemuImg.difference(raw, image) == nil)
        try Command.require("cp", raw, path("then.raw"))
        try QemuImg.io(image, ["write -q -P 8 10M 2M"])
        try convert("-l", "then", image, raw)
        try Command.require("cmp", raw, path("then.raw"))
        try convert("-S", "0", image, raw)
        #expect(try QemuImg.difference(raw, image) == nil)
        #expect(try Int(TestFile(raw, O_RDONLY).status().st_blocks) * 512 >= 80.MiB)
    }
}
