import Foundation
import TestSupport
import Testing

/// `create`, `info` and `check` beside qemu-img, through the program.
@Suite("Verbs on images", .needsQemuImg)
struct ImageVerbTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    private func json(_ words: [String]) throws -> NSObject {
        let text = try Command.require(words)
        return try #require(try JSONSerialization.jsonObject(with: Data(text.utf8)) as? NSObject)
    }

    /// Both programs say the same of the image, for people and for programs.
    private func expectSameInfo(
        _ image: String, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let program = TestEnvironment.program
        #expect(
            try json([program, "info", "--json", image])
                == json(["qemu-img", "info", "--output=json", image]),
            sourceLocation: sourceLocation)
        #expect(
            try Command.require(program, "info", image)
                == Command.require("qemu-img", "info", image), sourceLocation: sourceLocation)
        #expect(
            try json([program, "info", "--output", "json", "--backing-chain", image])
                == json(["qemu-img", "info", "--output=json", "--backing-chain", image]),
            sourceLocation: sourceLocation)
    }

    @Test(
        "info says what qemu-img says",
        arguments: [
            ["cluster_size=64k"], ["compat=0.10", "cluster_size=512"],
            ["lazy_refcounts=on", "compression_type=zstd", "refcount_bits=1"],
            ["extended_l2=on"],
        ])
    func info(options: [String]) throws {
        try QemuImg.create(image, size: 5_000_192, options: options)
        try expectSameInfo(image)
    }

    @Test("info lists snapshots, bitmaps and the chain as qemu-img does")
    func infoOfMuch() throws {
        try makeImage(image)
        try QemuImg.snapshot(image, create: "first")
        try QemuImg.snapshot(image, create: "a snapshot with a very long name")
        try Command.require("qemu-img", "bitmap", "--add", "-g", "131072", image, "b1")
        try Command.require("qemu-img", "bitmap", "--add", "--disable", image, "b2")
        try expectSameInfo(image)
        let top = folder.file("top.qcow2")
        try QemuImg.create(top, size: 20.MiB, backing: "disk.qcow2")
        try expectSameInfo(top)
    }

    @Test("info works while a backing file is missing, and the chain does not")
    func infoWithoutBacking() throws {
        try Command.require([
            "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "none.qcow2", "-F", "qcow2",
            image,
            "1M",
        ])
        #expect(try qcowfs("info", image).status == 0)
        expectRefusal(try qcowfs("info", "--backing-chain", image), naming: "none.qcow2")
    }

    @Test("A program that writes keeps info and check out, except with -U")
    func locked() throws {
        try makeImage(image)
        try whileQEMUHas(image) { process in
            for verb in ["info", "check"] {
                expectRefusal(try qcowfs(verb, image), naming: image, "qemu-io", "pid \(process)")
                #expect(try qcowfs(verb, "-U", image).status == 0)
            }
            expectRefusal(try qcowfs("create", image, "1M"), naming: image, "qemu-io")
        }
        #expect(try qcowfs("check", image).status == 0)
    }

    @Test("check ends with 0, 2 or 3, with a line on stderr for each finding")
    func checkStatus() throws {
        try makeImage(image)
        let clean = try qcowfs("check", "--output", "json", image)
        #expect(clean.status == 0 && clean.errors.isEmpty)
        #expect(
            try json([TestEnvironment.program, "check", "--json", image])
                == json(["qemu-img", "check", "--output=json", image]))

        // Two L2 entries of 64 KiB clusters, in the table behind the L1 table's only one.
        let file = try TestFile(image, O_RDWR)
        let table = 0x40000
        let entry = try file.read(table..<table + 8)
        try file.write([UInt8](repeating: 0, count: 8), at: table)
        let leak = try qcowfs("check", image)
        #expect(leak.status == 3 && leak.errors.split(separator: "\n").count == 1, "\(leak)")
        try file.write(entry, at: table)
        try file.write(entry, at: table + 8)
        let corruption = try qcowfs("check", "--json", image)
        #expect(corruption.status == 2 && corruption.output.contains("\"corruptions\": 1"))
        #expect(corruption.errors.contains("leak"))
    }

    @Test(
        "What has nothing to do leaves an image with bitmaps bit for bit as it is",
        arguments: [
            ["snapshot", "-d", "none", "IMAGE"], ["snapshot", "-a", "none", "IMAGE"],
            ["resize", "IMAGE", "8M"], ["bitmap", "--enable", "IMAGE", "on"],
            ["bitmap", "--disable", "IMAGE", "off"],
        ])
    func nothingToDo(words: [String]) throws {
        let image = folder.file("bitmaps.qcow2")
        try makeImage(image)
        try Command.require("qemu-img", "bitmap", "--add", image, "on")
        try Command.require("qemu-img", "bitmap", "--add", "--disable", image, "off")
        let sum = try Command.require("sha256sum", image)
        _ = try Command.run([TestEnvironment.program] + words.map { $0 == "IMAGE" ? image : $0 })
        #expect(try Command.require("sha256sum", image) == sum)
    }

    @Test("a check without a result is exit 1 and one line, whatever it has met before")
    func unchecked() throws {
        try makeImage(image)
        let file = try TestFile(image, O_RDWR)
        // The last L2 entry of the first table has a reserved bit, and the counts lie nowhere.
        try file.write([0, 0, 0, 0, 0, 0, 0, 2], at: 0x40000 + 8191 * 8)
        try file.write([0x80, 0, 0, 0, 0, 2, 0, 0], at: 0x10000)
        for words in [[], ["--json"], ["--repair", "leaks"]] {
            let result = try Command.run([TestEnvironment.program, "check"] + words + [image])
            expectRefusal(result, naming: "could not be checked", "repair")
        }
        #expect(try qcowfs("check", "--repair", "all", image).status == 0)
    }

    @Test("check finds a bitmap for which QEMU does not open the image", arguments: [11, 16])
    func strangeBitmap(place: Int) throws {
        try makeImage(image)
        try Command.require("qemu-img", "bitmap", "--add", image, "b")
        // The directory is the last that was written: table offset and length, flags, type.
        let file = try TestFile(image, O_RDWR)
        let directory = try file.read(0..<8192).withUnsafeBytes { bytes in
            let number = { (place: Int) in (0..<8).reduce(0) { $0 << 8 | Int(bytes[place + $1]) } }
            let magic = [0x23, 0x85, 0x28, 0x75] as [UInt8]
            let start = (0..<4096).first { Array(bytes[$0..<$0 + 4]) == magic }
            return number(try #require(start) + 8 + 16)
        }
        let byte = try file.read(directory + place..<directory + place + 1)
        try file.write([byte[0] ^ 2], at: directory + place)
        let judged = try QemuImg.check(image)
        #expect(judged.status != 0, "\(judged)")
        let check = try qcowfs("check", image)
        #expect(check.status == 2 && check.errors.contains("bitmap 'b'"), "\(check)")
    }

    @Test("Trap 71: check and info change nothing, not even on what they cannot read")
    func untouched() throws {
        try makeImage(image)
        _ = try folder.write([UInt8](repeating: 0x51, count: 1000), to: "raw")
        for path in [image, folder.file("raw")] {
            let before = try Command.require("sha256sum", path)
            _ = try qcowfs("check", path)
            _ = try qcowfs("info", path)
            #expect(try Command.require("sha256sum", path) == before)
        }
        expectRefusal(try qcowfs("check", folder.file("raw")), naming: "not a qcow2 image")
        expectRefusal(try qcowfs("info", folder.file("none")), naming: "none")
        expectRefusal(try qcowfs("info", folder.path), naming: "directory")
    }

    @Test(
        "create understands qemu-img's words",
        arguments: [
            [], ["-f", "qcow2"], ["-o", "compat=0.10,cluster_size=512"],
            ["-o", "compat=v3", "-o", "refcount_bits=1,lazy_refcounts=on"],
            ["-o", "compression_type=zstd,cluster_size=2M"], ["-o", "preallocation=metadata"],
            ["-o", "extended_l2=on"], ["-o", "extended_l2=on,cluster_size=16k"],
            ["-o", "extended_l2=on,preallocation=metadata"],
        ])
    func create(options: [String]) throws {
        let program = TestEnvironment.program
        try Command.require([program, "create"] + options + [image, "5M"])
        try Command.require("qemu-img", "check", image)
        let theirs = folder.file("theirs/disk.qcow2")
        _ = try folder.directory("theirs")
        try Command.require(
            ["qemu-img", "create", "-q", "-f", "qcow2"] + options + [theirs, "5M"])
        let ours = try Command.require("qemu-img", "info", image).split(separator: "\n")
        #expect(
            try ours.filter { !$0.hasPrefix("image:") && !$0.hasPrefix("disk size:") }
                == Command.require("qemu-img", "info", theirs).split(separator: "\n")
                .filter { !$0.hasPrefix("image:") && !$0.hasPrefix("disk size:") })
    }

    @Test(
        "every word for on and off is understood, by each verb that takes options",
        arguments: [("on", "off"), ("yes", "no"), ("true", "false"), ("y", "n")])
    func booleans(on: String, off: String) throws {
        let options = "extended_l2=\(on),lazy_refcounts=\(on),encryption=\(off)"
        try Command.require(TestEnvironment.program, "create", "-o", options, image, "1M")
        var info = try Command.require("qemu-img", "info", image)
        #expect(info.contains("extended l2: true") && info.contains("lazy refcounts: true"))
        try Command.require(
            TestEnvironment.program, "amend", "-o", "lazy_refcounts=\(off)", image)
        #expect(try Command.require("qemu-img", "info", image).contains("lazy refcounts: false"))
        let copy = folder.file("copy.qcow2")
        try Command.require(
            TestEnvironment.program, "convert", "-O", "qcow2", "-o",
            "data_file=copy.data,data_file_raw=\(on),lazy_refcounts=\(off)", image, copy)
        info = try Command.require("qemu-img", "info", copy)
        #expect(info.contains("data file raw: true") && info.contains("lazy refcounts: false"))
        let measure = ["measure", "-O", "qcow2", "-o", "extended_l2=\(on)", "--size", "1T"]
        #expect(
            try Command.require([TestEnvironment.program] + measure)
                == Command.require(["qemu-img"] + measure))
    }

    @Test(
        "create refuses in one line, and leaves no file",
        arguments: [
            ["DISK"], ["-b", "base", "DISK"], ["-F", "raw", "DISK", "1M"],
            ["-o", "foo=bar", "DISK", "1M"], ["-o", "size=1M", "DISK", "1M"],
            ["-o", "cluster_size=1000", "DISK", "1M"], ["-o", "compat=0.9", "DISK", "1M"],
            ["-o", "extended_l2=on,cluster_size=8k", "DISK", "1M"],
            ["-o", "extended_l2=on,compat=0.10", "DISK", "1M"],
            ["-o", "data_file_raw=on", "DISK", "1M"],
            ["-o", "data_file=disk.qcow2", "DISK", "1M"],
            ["-o", "data_file=x,compat=v2", "DISK", "1M"],
            ["-f", "vmdk", "DISK", "1M"],
            ["-b", "none", "-F", "raw", "DISK"], ["-o", "lazy_refcounts=maybe", "DISK", "1M"],
        ])
    func createRefuses(words: [String]) throws {
        let words = words.map { $0 == "DISK" ? image : $0 }
        expectRefusal(try Command.run([TestEnvironment.program, "create"] + words))
        #expect(try Command.shell("ls -A \(folder.path)").isEmpty)
    }

    @Test("A create that is killed leaves nothing behind, and an image that is there as it was")
    func killedCreate() throws {
        try makeImage(image)
        let before = try Command.require("sha256sum", image)
        for target in ["new.qcow2", "disk.qcow2"] {
            let create = try Command.start([
                TestEnvironment.program, "create", "-o", "preallocation=full",
                folder.file(target), "64G",
            ])
            usleep(300_000)
            kill(create.pid, SIGKILL)
            _ = try create.wait()
            #expect(try Command.shell("ls -A \(folder.path)") == "disk.qcow2\n")
        }
        #expect(try Command.require("sha256sum", image) == before)
    }

    @Test("amend changes what qemu-img shows, and refuses in one line")
    func amend() throws {
        try makeImage(image)
        try Command.require(
            TestEnvironment.program, "amend", "-o", "refcount_bits=8,lazy_refcounts=on", "-o",
            "size=16M", image)
        try expectSameInfo(image)
        let info = try Command.require("qemu-img", "info", image)
        #expect(info.contains("refcount bits: 8") && info.contains("lazy refcounts: true"))
        #expect(info.contains("16 MiB"))
        try Command.require(
            TestEnvironment.program, "amend", "-o", "compat=0.10,refcount_bits=16", image)
        #expect(try Command.require("qemu-img", "info", image).contains("compat: 0.10"))
        try QemuImg.io(image, ["read -q -P 0xA1 0 128k", "read -q -P 0xA2 1M 64k"])
        #expect(try QemuImg.check(image).status == 0)
        for options in ["cluster_size=4k", "nothing=on", "lazy_refcounts=on", "compat=0.9"] {
            expectRefusal(try qcowfs("amend", "-o", options, image), naming: image)
        }
        #expect(try qcowfs("amend", image).status == 64)
    }

    @Test(
        "Sizes",
        arguments: [
            ("512", 512), ("64k", 65536), ("64K", 65536), ("10M", 10 << 20), ("1.5G", 3 << 29),
            ("2T", 2 << 40), ("1P", 1 << 50), ("64KiB", 65536), ("3MiB", 3 << 20),
        ])
    func sizes(words: String, byteCount: Int) throws {
        #expect(try qcowfs("create", "-o", "cluster_size=2M", image, words).status == 0)
        #expect(try qcowfs("info", image).output.contains("(\(byteCount) bytes)"))
    }

    @Test(
        "What is no size is wrong usage",
        arguments: ["", "x", "1Q", "1.2.3M", "99999999999T", "1MB"])
    func noSize(words: String) throws {
        #expect(try qcowfs("create", image, words).status == 64)
    }
}
