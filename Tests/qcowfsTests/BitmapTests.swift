import Foundation
import TestSupport
import Testing

/// Dirty bitmaps through the mount and the verb, beside QEMU's tools.
@Suite("Dirty bitmaps", .enabledWhereMountable)
struct BitmapTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    // MARK: What the programs say

    private func qemu(_ words: String..., on image: String? = nil) throws {
        try Command.require(
            ["qemu-img", "bitmap"] + words.dropLast() + [image ?? self.image]
                + [words[words.count - 1]])
    }

    private func ours(_ words: String...) throws {
        try Command.require(
            [TestEnvironment.program, "bitmap"] + words.dropLast() + [image]
                + [words[words.count - 1]])
    }

    /// Names with their flags, as QEMU lists them.
    private func listing(_ image: String? = nil) throws -> [String: [String]] {
        let pairs = try QemuImg.info(image ?? self.image).bitmaps.map { ($0.name, $0.flags) }
        return Dictionary(uniqueKeysWithValues: pairs)
    }

    /// What our map lists of a bitmap.
    private func marked(_ bitmap: String, of image: String? = nil) throws -> [Range<Int>] {
        try Self.marked(bitmap, of: image ?? self.image)
    }

    static func marked(_ bitmap: String, of image: String) throws -> [Range<Int>] {
        struct Run: Decodable {
            let start: Int
            let length: Int
        }
        let json = try Command.require(
            TestEnvironment.program, "map", "--json", "--bitmap", bitmap, image)
        return try JSONDecoder().decode([Run].self, from: Data(json.utf8))
            .map { $0.start..<$0.start + $0.length }
    }

    /// What QEMU finds in a bitmap: it merges it into one of its own making, at a fine grain.
    private func markedByQEMU(_ bitmap: String) throws -> [Range<Int>] {
        let copy = folder.file("copy.qcow2")
        try Command.require("cp", image, copy)
        try qemu("--add", "--merge", bitmap, "-g", "512", "copy", on: copy)
        let reader = try ReferenceImage(copy).qcow2
        let bitmap = try #require(try reader.bitmaps().first { $0.name == "copy" })
        return FixtureTests.joined(
            bitmap.marked.map { $0 * 512..<min(($0 + 1) * 512, reader.byteCount) })
    }

    private func write(_ mount: TestMount, _ byte: UInt8, at offset: Int) throws {
        let file = try mount.open()
        try file.write([UInt8](repeating: byte, count: 8.KiB), at: offset)
        try file.sync()
    }

    // MARK: The life of a bitmap

    @Test("Trap 64: what is written through the mount is in the bitmaps that QEMU finds afterwards")
    func lifeCycle() throws {
        try makeImage(image)
        try qemu("--add", "-g", "64k", "b1")
        try qemu("--add", "-g", "4k", "b2")
        try qemu("--add", "--disable", "b3")
        try QemuImg.io(image, ["write -q -P 1 2M 64k"])
        try TestMount(image, in: folder, options: ["-r"]).unmount()
        #expect(try listing() == ["b1": ["auto"], "b2": ["auto"], "b3": []])
        let mount = try TestMount(image, in: folder)
        #expect(try listing() == ["b1": ["auto"], "b2": ["auto"], "b3": []])
        try write(mount, 1, at: 5.MiB)
        #expect(
            try listing() == [
                "b1": ["auto", "in-use"], "b2": ["auto", "in-use"], "b3": ["in-use"],
            ])
        try mount.open().punch(6.MiB..<6.MiB + 100_000)
        try mount.unmount()
        #expect(try listing() == ["b1": ["auto"], "b2": ["auto"], "b3": []])
        #expect(try QemuImg.check(image).status == 0)
        #expect(
            try marked("b1") == [2.MiB..<2.MiB + 64.KiB, 5.MiB..<5.MiB + 64.KiB]
                + [6.MiB..<6.MiB + 128.KiB])
        #expect(
            try marked("b2") == [2.MiB..<2.MiB + 64.KiB, 5.MiB..<5.MiB + 8.KiB]
                + [6.MiB..<6.MiB + 100.KiB])
        #expect(try marked("b3") == [])
        for bitmap in ["b1", "b2", "b3"] {
            #expect(try markedByQEMU(bitmap) == marked(bitmap))
        }
        // QEMU goes on recording in what we stored.
        try QemuImg.io(image, ["write -q -P 2 7M 4k"])
        #expect(try marked("b2").last == 7.MiB..<7.MiB + 4.KiB)
    }

    @Test("Trap 65: after kill -9 a bitmap is inconsistent, and the disk is not")
    func killed() throws {
        try makeImage(image)
        try qemu("--add", "backup")
        let mount = try TestMount(image, in: folder)
        try write(mount, 7, at: 5.MiB)
        let daemon = try mount.daemon()
        kill(daemon, SIGKILL)
        #expect(eventually { !isRunning(daemon) })
        _ = try? Command.run([TestEnvironment.program, "umount", mount.mountpoint])
        mount.wasUnmounted()
        #expect(try listing() == ["backup": ["auto", "in-use"]])
        let check = try QemuImg.check(image)
        #expect(check.status == 0 || check.status == 3, "\(check)")
        expectRefusal(
            try qcowfs("map", "--bitmap", "backup", image), naming: "backup", "inconsistent",
            "--remove")
        // Written to again it stays so, until somebody removes it.
        let again = try TestMount(image, in: folder)
        try write(again, 8, at: 1.MiB)
        try again.unmount()
        #expect(try listing() == ["backup": ["auto", "in-use"]])
        try ours("--remove", "backup")
        #expect(try listing().isEmpty)
        #expect(try QemuImg.check(image).status == 0)
    }

    @Test("Trap 66: a bitmap follows the size of the disk, and QEMU takes it")
    func resized() throws {
        try makeImage(image)
        try qemu("--add", "-g", "512", "fine")
        let mount = try TestMount(image, in: folder, options: ["-o", "shrink"])
        try mount.open().truncate(to: 300.MiB)
        try mount.open().truncate(to: 298.MiB)
        try mount.unmount()
        #expect(try marked("fine") == [8.MiB..<298.MiB])
        #expect(try markedByQEMU("fine") == marked("fine"))
        #expect(try QemuImg.check(image).status == 0)
    }

    // MARK: The verb

    @Test("bitmap does what qemu-img bitmap does")
    func verb() throws {
        let theirs = folder.file("theirs.qcow2")
        try makeImage(image, size: 20.MiB)
        try qemu("--add", "-g", "64k", "source")
        try QemuImg.io(image, ["write -q 3M 1M", "discard -q 10M 64k"])
        try Command.require("cp", image, theirs)
        let steps = [
            ["--add", "b1"], ["--add", "-g", "1M", "--disable", "b2"],
            ["--add", "--merge", "source", "-g", "4k", "b3"], ["--merge", "source", "b2"],
            ["--enable", "b2"], ["--disable", "b1"], ["--clear", "b3"],
            ["--clear", "--merge", "b2", "--disable", "b3"], ["--remove", "b1"],
            ["--remove", "--add", "source"],
        ]
        for words in steps {
            let name = words[words.count - 1]
            for (program, path) in [(TestEnvironment.program, image), ("qemu-img", theirs)] {
                try Command.require([program, "bitmap"] + words.dropLast() + [path, name])
            }
            #expect(try listing() == listing(theirs), "\(words)")
            for bitmap in try listing().keys {
                #expect(try marked(bitmap) == marked(bitmap, of: theirs), "\(words), \(bitmap)")
            }
            #expect(try QemuImg.check(image).status == 0, "\(words)")
        }
    }

    @Test("bitmap --merge -b takes the marks of another image")
    func mergeFromAnother() throws {
        try makeImage(image)
        let other = folder.file("other.qcow2")
        try Command.require("cp", image, other)
        try qemu("--add", "-g", "4k", "theirs", on: other)
        try QemuImg.io(other, ["write -q 3M 8k"])
        try ours("--add", "-g", "64k", "--merge", "theirs", "-b", other, "-F", "qcow2", "here")
        #expect(try marked("here") == [3.MiB..<3.MiB + 64.KiB])
        try QemuImg.create(other, size: 9.MiB)
        try qemu("--add", "theirs", on: other)
        expectRefusal(
            try qcowfs("bitmap", "--merge", "theirs", "-b", other, image, "here"),
            naming: "different sizes")
    }

    @Test("bitmap refuses in one line, and changes nothing")
    func refusals() throws {
        try makeImage(image)
        try qemu("--add", "b")
        let old = folder.file("old.qcow2")
        try makeImage(old, options: ["compat=0.10"])
        let before = try Command.require("sha256sum", image, old)
        for (words, named) in [
            (["--add", image, "b"], "exists"), (["--remove", image, "c"], "no bitmap"),
            (["--clear", image, "c"], "no bitmap"), (["--merge", "c", image, "b"], "no bitmap"),
            (["--add", "-g", "1000", image, "c"], "power of two"),
            (["--add", "-g", "256", image, "c"], "power of two"),
            (["--add", "-g", "4G", image, "c"], "power of two"), (["--add", image, ""], "name"),
            (["--add", image, String(repeating: "x", count: 1024)], "1023"),
            (["--add", old, "b"], "version 2"), (["--add", "--add", image, "c"], "exists"),
        ] {
            expectRefusal(
                try Command.run([TestEnvironment.program, "bitmap"] + words), naming: named)
        }
        #expect(try Command.require("sha256sum", image, old) == before)
        for words in [[image, "b"], ["--clear", "-g", "4k", image, "b"], ["--add", image]] {
            let result = try Command.run([TestEnvironment.program, "bitmap"] + words)
            #expect(result.status == 64, "\(result)")
        }
    }

    @Test("a disk of 0 bytes gets no bitmap, and a disk with one does not become that small")
    func emptyDisk() throws {
        let empty = folder.file("empty.qcow2")
        try QemuImg.create(empty, size: 0)
        try makeImage(image)
        try qemu("--add", "b")
        let before = try Command.require("sha256sum", empty)
        expectRefusal(try qcowfs("bitmap", "--add", empty, "b"), naming: "0 bytes", "resize")
        expectRefusal(
            try qcowfs("resize", "--shrink", image, "0"), naming: "'b'", "0 bytes",
            "bitmap --remove")
        #expect(try Command.require("sha256sum", empty) == before)
        #expect(try QemuImg.info(image).byteCount == 8.MiB)
        #expect(try QemuImg.info(image).bitmaps.map(\.flags) == [["auto"]])
        try Command.require(TestEnvironment.program, "bitmap", "--remove", image, "b")
        try Command.require(TestEnvironment.program, "resize", "--shrink", image, "0")
        for path in [image, empty] { #expect(try QemuImg.info(path).byteCount == 0) }
    }

    @Test("bitmap on a mounted image names the daemon")
    func mounted() throws {
        try makeImage(image)
        let mount = try TestMount(image, in: folder)
        expectRefusal(
            try qcowfs("bitmap", "--add", image, "b"), naming: "qcowfs",
            "pid \(try mount.daemon())")
        try mount.unmount()
    }

    @Test(
        "Bitmaps come and go in headers with a backing file and other extensions",
        arguments: ["512", "4k", "64k"])
    func headers(clusterSize: String) throws {
        try QemuImg.create(folder.file("a rather long name of a base.qcow2"), size: 1.MiB)
        try QemuImg.create(
            image, size: 1.MiB, options: ["cluster_size=\(clusterSize)"],
            backing: "a rather long name of a base.qcow2")
        for name in ["one", "two"] { try ours("--add", name) }
        #expect(try listing() == ["one": ["auto"], "two": ["auto"]])
        let info = try Command.require("qemu-img", "info", image)
        #expect(info.contains("a rather long name of a base.qcow2"))
        #expect(info.contains("backing file format: qcow2"))
        try QemuImg.io(image, ["write -q 0 4k"])
        for name in ["one", "two"] { try ours("--remove", name) }
        #expect(try listing().isEmpty)
        #expect(try QemuImg.check(image).status == 0)
        #expect(
            try Command.require("qemu-img", "info", image).contains(
                "a rather long name of a base.qcow2"))
    }
}
