import Glibc
import TestSupport
import Testing

/// `convert -o data_file=…`: an image and its data file, both or neither.
@Suite("Converting to an image with a data file", .needsQemuImg)
struct ConvertDataFileTests {
    let folder: TemporaryDirectory
    let source: String
    let target: String
    let data: String
    let raw: String

    init() throws {
        folder = try TemporaryDirectory()
        source = folder.file("source.qcow2")
        target = folder.file("target.qcow2")
        data = folder.file("target.data")
        raw = folder.file("source.raw")
        try makeImage(
            source, size: 20.MiB + 512,
            commands: ["write -q -P 1 0 3M", "write -q -P 2 17M 64k", "write -q -P 3 20M 512"])
        try QemuImg.convert(source, to: raw, from: "qcow2", format: "raw")
    }

    private func convert(_ options: String, _ words: String...) throws -> Command.Result {
        try Command.run(
            [TestEnvironment.program, "convert", "-O", "qcow2", "-o", options] + words
                + [target])
    }

    /// qemu-img, where it finds a data file that lies beside its image.
    private func qemuImg(_ words: String) throws -> Command.Result {
        try Command.run(["bash", "-c", "cd \(folder.path) && qemu-img \(words)"])
    }

    private func files() throws -> String { try Command.require("ls", "-A", folder.path) }

    @Test(
        "both hold the disk, and the data file is found beside the image",
        arguments: [
            "data_file=target.data", "data_file=target.data,data_file_raw=on",
            "data_file=target.data,preallocation=metadata",
            "data_file=target.data,preallocation=falloc,data_file_raw=on",
            "data_file=target.data,preallocation=full,extended_l2=on",
        ], [false, true])
    func complete(options: String, fromRaw: Bool) throws {
        // What is there is replaced.
        _ = try folder.write([UInt8](repeating: 9, count: 30.MiB), to: "target.data")
        #expect(try convert(options, fromRaw ? raw : source).status == 0)
        #expect(try qemuImg("compare -f raw -F qcow2 source.raw target.qcow2").status == 0)
        #expect(try qemuImg("check target.qcow2").status == 0)
        #expect(try qemuImg("info target.qcow2").output.contains("data file: target.data"))
        #expect(try qcowfs("compare", source, target).status == 0)
        #expect(try TestFile(data, O_RDONLY).byteCount() == 20.MiB + 512)
        if options.contains("data_file_raw=on") {
            #expect(try Command.run(["cmp", raw, data]).status == 0)
        }
        if !options.contains("preallocation=f") {
            #expect(try Int(TestFile(data, O_RDONLY).status().st_blocks) * 512 < 4.MiB)
        }
    }

    @Test("what cannot be made leaves neither file")
    func refused() throws {
        let before = try files()
        for (options, words, named) in [
            ("data_file=target.data", ["-c", source], "compressed"),
            ("data_file=target.qcow2", [source], "its own data file"),
            ("data_file=none/target.data", [source], "cannot create"),
            ("data_file=source.raw", [raw], "in use"),
            ("data_file=target.data,compat=0.10", [source], "compat=1.1"),
        ] {
            expectRefusal(
                try Command.run(
                    [TestEnvironment.program, "convert", "-O", "qcow2", "-o", options] + words
                        + [target]), naming: named)
        }
        let piped = try Command.run([
            "bash", "-c",
            "cat \(raw) | \(TestEnvironment.program) convert -O qcow2 -o data_file=target.data "
                + "- \(target)",
        ])
        expectRefusal(piped, naming: "--spool")
        #expect(try files() == before)
        try Command.require([
            "bash", "-c",
            "cat \(raw) | \(TestEnvironment.program) convert -O qcow2 --spool \(folder.path) "
                + "-o data_file=target.data - \(target)",
        ])
        #expect(try qcowfs("compare", raw, target).status == 0)
    }

    @Test("a data file that is in use stays, and so does the image")
    func inUse() throws {
        let user = folder.file("user.qcow2")
        try QemuImg.create(user, size: 1.MiB, options: ["data_file=\(data)"])
        let before = (try files(), try Command.require("sha256sum", user, data))
        try whileQEMUHas(user) { _ in
            expectRefusal(try convert("data_file=target.data", source), naming: "target.data")
        }
        #expect(try files() == before.0)
        #expect(try Command.require("sha256sum", user, data) == before.1)
    }

    @Test(
        "an interrupted conversion leaves what was there, and nothing else",
        arguments: [SIGINT, SIGKILL], [false, true])
    func stopped(signal: Int32, wasThere: Bool) throws {
        if wasThere { #expect(try convert("data_file=target.data", source).status == 0) }
        let before = (try files(), try Command.shell("sha256sum \(folder.path)/*"))
        var ends: [Int32] = [0, 0]
        try #require(pipe2(&ends, O_CLOEXEC) == 0)
        let conversion = try Command.start(
            [
                TestEnvironment.program, "convert", "-O", "qcow2", "-o", "data_file=target.data",
                "-", target,
            ], input: "/proc/self/fd/\(ends[0])")
        close(ends[0])
        defer { close(ends[1]) }
        // More than a pipe holds: what can be written later was read, and written to a new file.
        let bytes = try TestFile(source, O_RDONLY).read(0..<2.MiB)
        #expect(write(ends[1], bytes, bytes.count) == bytes.count)
        kill(conversion.pid, signal)
        let result = try conversion.wait(timeout: 20)
        if signal == SIGINT { expectRefusal(result, naming: "interrupted") }
        #expect(result.status != 0)
        #expect(try files() == before.0)
        #expect(try Command.shell("sha256sum \(folder.path)/*") == before.1)
    }
}
