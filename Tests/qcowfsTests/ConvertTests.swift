import Glibc
import TestSupport
import Testing

/// `convert`, `compare`, `read` and `write`, with QEMU as the judge.
@Suite("Copies without a mount", .needsQemuImg)
struct ConvertTests {
    let folder: TemporaryDirectory
    let image: String
    let target: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
        target = folder.file("target")
        try makeImage(
            image, size: 40.MiB + 512,
            commands: [
                "write -q -P 1 0 3M", "write -q -P 2 17M 64k", "write -q -P 0 18M 1M",
                "write -q -z 20M 1M", "write -q -P 3 39M 1M", "write -q -P 4 40M 512",
            ])
    }

    private func convert(_ words: String...) throws {
        try Command.require([TestEnvironment.program, "convert"] + words)
    }

    private func files() throws -> String { try Command.require("ls", "-A", folder.path) }

    @Test("a raw target is equal, sparse, and ends where the disk ends")
    func raw() throws {
        try convert(image, target)
        #expect(try QemuImg.difference(target, image) == nil)
        let status = try TestFile(target, O_RDONLY).status()
        #expect(Int(status.st_size) == 40.MiB + 512)
        #expect(Int(status.st_blocks) * 512 < 5.MiB)
    }

    @Test("-S 0 writes the zeros out")
    func notSparse() throws {
        try convert("-S", "0", image, target)
        #expect(try QemuImg.difference(target, image) == nil)
        #expect(try Int(TestFile(target, O_RDONLY).status().st_blocks) * 512 >= 40.MiB)
    }

    @Test("a qcow2 target is equal, has no backing file, and leaves out clusters full of zeros")
    func qcow2() throws {
        let top = folder.file("top.qcow2")
        try QemuImg.create(top, size: 48.MiB, backing: "disk.qcow2")
        try QemuImg.io(top, ["write -q -P 7 1M 64k", "write -q -z 2M 64k", "write -q -P 8 47M 5k"])
        try convert("-O", "qcow2", top, target)
        #expect(try Command.run(["qemu-img", "compare", top, target]).status == 0)
        #expect(try QemuImg.check(target).status == 0)
        #expect(try !Command.require("qemu-img", "info", target).contains("backing"))
        #expect(try Int(TestFile(target, O_RDONLY).status().st_size) < 6.MiB)
    }

    @Test("a raw source becomes an image")
    func fromRaw() throws {
        let raw = folder.file("disk.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        try convert("-f", "raw", "-O", "qcow2", raw, target)
        #expect(try QemuImg.difference(raw, target) == nil)
        #expect(try QemuImg.check(target).status == 0)
    }

    @Test("a disk without the qcow2 magic is taken for raw")
    func probing() throws {
        let raw = folder.file("disk.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        try convert("-O", "qcow2", raw, target)
        #expect(try QemuImg.difference(raw, target) == nil)
    }

    @Test("a file that is there is replaced, unless a program uses it")
    func replacing() throws {
        try makeImage(target)
        try convert("-O", "qcow2", image, target)
        #expect(try Command.run(["qemu-img", "compare", image, target]).status == 0)
        let before = try Command.require("sha256sum", target)
        try whileQEMUHas(target) { _ in
            expectRefusal(try qcowfs("convert", image, target), naming: "in use")
        }
        #expect(try Command.require("sha256sum", target) == before)
    }

    @Test("a source that cannot be read leaves no target and no temporary file")
    func failing() throws {
        try QemuImg.create(folder.file("top.qcow2"), backing: "disk.qcow2")
        unlink(image)
        let before = try files()
        expectRefusal(
            try qcowfs("convert", folder.file("top.qcow2"), target), naming: "disk.qcow2")
        #expect(try files() == before)
    }

    @Test(
        "an interrupted or killed conversion leaves what was there, and nothing else",
        arguments: [SIGINT, SIGTERM, SIGKILL], ["raw", "qcow2"])
    func stopped(signal: Int32, format: String) throws {
        try makeImage(target)
        let before = (try files(), try Command.require("sha256sum", target))
        var ends: [Int32] = [0, 0]
        try #require(pipe2(&ends, O_CLOEXEC) == 0)
        let conversion = try Command.start(
            [TestEnvironment.program, "convert", "-O", format, "-", target],
            input: "/proc/self/fd/\(ends[0])")
        close(ends[0])
        defer { close(ends[1]) }
        // More than a pipe holds: what can be written later was read, and written to a new file.
        let bytes = [UInt8](repeating: 7, count: 3.MiB)
        #expect(write(ends[1], bytes, bytes.count) == bytes.count)
        kill(conversion.pid, signal)
        let result = try conversion.wait(timeout: 20)
        if signal == SIGKILL {
            #expect(result.status == 128 + SIGKILL)
        } else if signal == SIGINT {
            expectRefusal(result, naming: "interrupted")
        }
        #expect(result.status != 0)
        #expect(try files() == before.0)
        #expect(try Command.require("sha256sum", target) == before.1)
    }

    @Test("compare tells equal, different and impossible apart")
    func compare() throws {
        try convert(image, target)
        let equal = try qcowfs("compare", image, target)
        #expect(equal.status == 0)
        #expect(equal.output == "Images are identical.\n")
        try TestFile(target, O_RDWR).write([9], at: 17.MiB + 70)
        let different = try qcowfs("compare", image, target)
        #expect(different.status == 1)
        #expect(different.output.contains("\(17.MiB + 70)"))
        #expect(try qcowfs("compare", image, folder.file("missing")).status == 2)
    }

    @Test("compare takes a longer disk for equal where the rest is zero, except with -s")
    func compareSizes() throws {
        try convert(image, target)
        truncate(target, off_t(50.MiB))
        #expect(try qcowfs("compare", image, target).status == 0)
        #expect(try qcowfs("compare", "-s", image, target).status == 1)
        try TestFile(target, O_RDWR).write([9], at: 45.MiB)
        #expect(try qcowfs("compare", image, target).status == 1)
    }

    @Test("read and write move bytes of the disk")
    func readAndWrite() throws {
        let program = TestEnvironment.program
        try Command.shell(
            "head -c 100000 /dev/zero | tr '\\0' 'x' | \(program) write --offset 5M \(image)")
        try QemuImg.io(image, ["read -q -P 0x78 5M 100000", "read -q -P 0 5342880 512"])
        let count = try Command.shell(
            "\(program) read --offset 5M --length 100001 \(image) | tr -d -c 'x' | wc -c")
        #expect(Int(count.trimmingPrefix(" ").prefix { $0.isNumber }) == 100_000)
        expectRefusal(
            try qcowfs("read", "--offset", "40M", "--length", "1M", image), naming: "disk has")
    }

    @Test("measure says what qemu-img says", arguments: [[], ["-O", "qcow2"]])
    func measure(format: [String]) throws {
        let raw = folder.file("disk.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        try Command.require("qemu-img", "bitmap", "--add", "-g", "512", image, "one")
        try Command.require("qemu-img", "bitmap", "--add", image, "two")
        for subject in [
            ["--size", "1T"], ["--size", "0"], ["--size", "5000000000"], [image], [raw],
        ] {
            let words = ["measure"] + format + subject
            #expect(
                try Command.require([TestEnvironment.program] + words)
                    == Command.require(["qemu-img"] + words), "\(words)")
        }
    }

    @Test("discard gives clusters full of zeros back, and the disk stays")
    func discard() throws {
        try convert(image, target)
        let result = try qcowfs("discard", "--json", image)
        #expect(result.status == 0, "\(result)")
        #expect(result.output.contains("\(1.MiB)"))
        #expect(try QemuImg.difference(target, image) == nil)
        #expect(try QemuImg.check(image).status == 0)
        #expect(try !QemuImg.dataRanges(image).contains { $0.contains(18.MiB) })
    }

    @Test("discard leaves zeros over a backing file in place")
    func discardOverBacking() throws {
        let top = folder.file("top.qcow2")
        try QemuImg.create(top, backing: "disk.qcow2")
        try QemuImg.io(top, ["write -q -P 0 0 1M"])
        try convert(top, target)
        #expect(try qcowfs("discard", top).status == 0)
        #expect(try QemuImg.difference(target, top) == nil)
        #expect(try QemuImg.check(top).status == 0)
    }

    @Test("-c makes a smaller image with the same disk", arguments: ["2", "1"])
    func compressed(threads: String) throws {
        try convert("-c", "-m", threads, "-O", "qcow2", image, target)
        #expect(try Command.run(["qemu-img", "compare", image, target]).status == 0)
        let check = try QemuImg.check(target)
        #expect(check.status == 0)
        #expect(check.output.contains("100.00% compressed"), "\(check)")
        #expect(try TestFile(target, O_RDONLY).byteCount() < 1.MiB)
    }

    @Test("-l copies a snapshot, by name or by identifier")
    func snapshot() throws {
        try convert(image, target)
        try QemuImg.snapshot(image, create: "before")
        try QemuImg.io(image, ["write -q -P 77 0 4M"])
        for word in ["before", "1", "snapshot.name=before"] {
            let copy = folder.file("copy.raw")
            try convert("-l", word, image, copy)
            try Command.require("cmp", copy, target)
        }
        expectRefusal(try qcowfs("convert", "-l", "other", image, target), naming: "other")
    }

    @Test(
        "a mounted image is copied from and to through its raw file", .enabledWhereMountable)
    func mounted() throws {
        let other = folder.file("other.qcow2")
        try makeImage(other, size: 48.MiB, commands: ["write -q -P 0xEE 0 48M"])
        let mount = try TestMount(image, in: folder)
        try convert("-O", "qcow2", mount.disk, target)
        #expect(try QemuImg.check(target).status == 0)
        let second = try TestMount([other], on: folder.directory("second"))
        try convert("-f", "raw", mount.disk, second.disk)
        let tooLarge = folder.file("large.raw")
        try Command.require("truncate", "-s", "49M", tooLarge)
        expectRefusal(try qcowfs("convert", tooLarge, second.disk), naming: "no space")
        try mount.unmount()
        try second.unmount()
        #expect(try Command.run(["qemu-img", "compare", image, target]).status == 0)
        // What lies behind the end of the smaller disk stays.
        let (start, rest) = (40.MiB + 512, 8.MiB - 512)
        try QemuImg.io(other, ["read -q -P 0xEE \(start) \(rest)", "read -q -P 0 18M 20M"])
        try QemuImg.io(other, ["read -q -P 1 0 3M", "read -q -P 4 40M 512"])
        #expect(try QemuImg.check(other).status == 0)
        // Holes became holes.
        #expect(try !QemuImg.dataRanges(other).contains { $0.contains(30.MiB) })
    }

    @Test("-o makes the image that create would make")
    func options() throws {
        try convert(
            "-O", "qcow2", "-o", "cluster_size=4k,compat=0.10", "-o", "preallocation=metadata",
            image, target)
        #expect(try Command.run(["qemu-img", "compare", image, target]).status == 0)
        #expect(try QemuImg.check(target).status == 0)
        let info = try Command.require("qemu-img", "info", target)
        #expect(info.contains("cluster_size: 4096") && info.contains("compat: 0.10"))
        expectRefusal(
            try qcowfs("convert", "-O", "qcow2", "-o", "backing_file=x", image, target),
            naming: "backing file")
    }

    @Test("sha256 and sha1 are those of the raw file")
    func digests() throws {
        try convert(image, target)
        for verb in ["sha256", "sha1"] {
            let expected = try Command.require("\(verb)sum", target).prefix { $0 != " " }
            #expect(try qcowfs(verb, image).output == "\(expected)  \(image)\n")
        }
    }
}
