import Glibc
import TestSupport
import Testing

/// `convert` from and to pipes, with QEMU as the judge.
@Suite("Copies through pipes", .needsQemuImg)
struct ConvertPipeTests {
    let folder: TemporaryDirectory
    let image: String
    let raw: String
    let target: String
    let program = TestEnvironment.program

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
        raw = folder.file("disk.raw")
        target = folder.file("target")
        try makeImage(
            image, size: 40.MiB + 512,
            commands: [
                "write -q -P 1 0 3M", "write -q -P 2 17M 64k", "write -q -P 0 18M 1M",
                "write -q -z 20M 1M", "write -q -P 3 39M 1M", "write -q -P 4 40M 512",
            ])
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
    }

    private func expectSame(_ image: String, sourceLocation: SourceLocation = #_sourceLocation)
        throws
    {
        #expect(try QemuImg.difference(raw, image) == nil, sourceLocation: sourceLocation)
        #expect(try QemuImg.check(image).status == 0, sourceLocation: sourceLocation)
    }

    /// One line of shell that must fail with exit 1 and one line of words.
    private func expectFailure(
        _ line: String, naming words: String..., sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let result = try Command.run(["bash", "-o", "pipefail", "-c", line])
        let errors = result.errors.split(separator: "\n")
        #expect(result.status == 1, "\(result)", sourceLocation: sourceLocation)
        #expect(
            errors.count == 1 && errors[0].hasPrefix("qcowfs: convert: "), "\(result)",
            sourceLocation: sourceLocation)
        for word in words {
            #expect(result.errors.contains(word), "\(result)", sourceLocation: sourceLocation)
        }
        #expect(access(target, F_OK) != 0, "a target was left", sourceLocation: sourceLocation)
    }

    // MARK: To a pipe

    @Test("a raw disk is written as it is")
    func rawOut() throws {
        for source in [image, raw] {
            try Command.shell("\(program) convert \(source) - | cat > \(target)")
            try Command.require("cmp", raw, target)
        }
    }

    @Test(
        "an image is written in one pass",
        arguments: [
            "cluster_size=64k", "cluster_size=512", "cluster_size=4k,compat=0.10",
            "cluster_size=2M", "refcount_bits=1", "refcount_bits=64,cluster_size=512",
            "extended_l2=on", "lazy_refcounts=on,compression_type=zstd",
        ], [1, 2])
    func imageOut(options: String, threads: Int) throws {
        try Command.shell(
            "\(program) convert -m \(threads) -O qcow2 -o \(options) \(image) - | cat > \(target)")
        try expectSame(target)
        // And it can be read from a pipe again.
        let again = folder.file("again")
        try Command.shell("cat \(target) | \(program) convert - \(again)")
        try Command.require("cmp", raw, again)
    }

    @Test("an image in a pipe has no clusters full of zeros, unless -S 0 wants them")
    func sparse() throws {
        try Command.shell("\(program) convert -O qcow2 \(image) - | cat > \(target)")
        #expect(try TestFile(target, O_RDONLY).byteCount() < 5.MiB)
        try Command.shell("\(program) convert -S 0 -O qcow2 \(image) - | cat > \(target)")
        try expectSame(target)
        #expect(try TestFile(target, O_RDONLY).byteCount() > 40.MiB)
    }

    @Test("a disk without bytes, and one that does not end with a sector")
    func odd() throws {
        for size in [0, 1000, 65536 + 513] {
            _ = try folder.write([UInt8](repeating: 7, count: size), to: "disk.raw")
            try Command.shell("\(program) convert -f raw -O qcow2 \(raw) - | cat > \(target)")
            try expectSame(target)
            for words in ["-O qcow2", "-O raw", "-c -O qcow2"] {
                try Command.shell("cat \(raw) | \(program) convert -f raw \(words) - \(target)")
                if words == "-O raw" {
                    try Command.require("cmp", raw, target)
                } else {
                    try expectSame(target)
                }
            }
        }
    }

    @Test("a pipe becomes an image of every cluster size")
    func clusterSizes() throws {
        for bits in 9...21 {
            let layout = "cluster_size=\(1 << bits)"
            for options in bits < 14 ? [layout] : [layout, layout + ",extended_l2=on"] {
                try Command.shell(
                    "cat \(raw) | \(program) convert -f raw -O qcow2 -o \(options) - \(target)")
                try expectSame(target)
            }
        }
    }

    @Test("a reader that goes away is one sentence and exit 1, not a signal")
    func brokenPipe() throws {
        for words in ["", "-O qcow2"] {
            let result = try Command.run([
                "bash", "-c",
                "\(program) convert -S 0 \(words) \(image) - | head -c 100 > /dev/null; "
                    + "exit ${PIPESTATUS[0]}",
            ])
            #expect(result.status == 1, "\(result)")
            #expect(result.errors.contains("standard output"), "\(result)")
            #expect(result.errors.split(separator: "\n").count == 1, "\(result)")
        }
    }

    @Test("what cannot be laid out before it is made needs --spool")
    func spoolOut() throws {
        let place = try folder.directory("spool")
        for words in ["-c", "-o preallocation=metadata"] {
            try expectFailure(
                "\(program) convert \(words) -O qcow2 \(image) - > /dev/null", naming: "--spool")
            try Command.shell(
                "\(program) convert --spool \(place) \(words) -O qcow2 \(image) - "
                    + "| cat > \(target)")
            try expectSame(target)
            #expect(try Command.require("ls", "-A", place) == "")
            unlink(target)
        }
        try expectFailure("\(program) convert -O qcow2 - - < <(cat \(raw))", naming: "--spool")
        try expectFailure("\(program) convert -O qcow2 - - < <(cat \(image))", naming: "--spool")
        for source in [raw, image] {
            try Command.shell(
                "cat \(source) | \(program) convert --spool \(place) -O qcow2 - - "
                    + "| cat > \(target)")
            try expectSame(target)
        }
    }

    // MARK: From a pipe

    @Test("a raw disk of unknown length becomes a file of any kind")
    func rawIn() throws {
        try Command.shell("cat \(raw) | \(program) convert - \(target)")
        try Command.require("cmp", raw, target)
        #expect(try Int(TestFile(target, O_RDONLY).status().st_blocks) * 512 < 5.MiB)
        try Command.shell("cat \(raw) | \(program) convert - - | cmp - \(raw)")
        for words in ["", "-c", "-o cluster_size=512", "-c -o cluster_size=4k", "-S 0"] {
            try Command.shell("cat \(raw) | \(program) convert \(words) -O qcow2 - \(target)")
            try expectSame(target)
        }
    }

    @Test(
        "an image as qemu-img convert writes it is read in one pass",
        arguments: [
            "", "-c", "-c -o compression_type=zstd", "-W -m 8", "-c -W -m 8",
            "-o cluster_size=512", "-o cluster_size=2M", "-c -o cluster_size=4k",
            "-o preallocation=metadata", "-o extended_l2=on", "-o compat=0.10",
        ])
    func imageIn(flags: String) throws {
        let source = folder.file("source.qcow2")
        try Command.shell("qemu-img convert \(flags) -O qcow2 \(raw) \(source)")
        try Command.shell("cat \(source) | \(program) convert - \(target)")
        try Command.require("cmp", raw, target)
        try Command.shell("cat \(source) | \(program) convert -O qcow2 - \(target)")
        try expectSame(target)
        try Command.shell("cat \(source) | \(program) convert - - | cmp - \(raw)")
    }

    @Test("an image as we write it is read in one pass", arguments: ["", "-c", "-m 1"])
    func ourImageIn(flags: String) throws {
        let source = folder.file("source.qcow2")
        try Command.shell("\(program) convert \(flags) -O qcow2 \(raw) \(source)")
        try Command.shell("cat \(source) | \(program) convert -c -O qcow2 - \(target)")
        try expectSame(target)
    }

    @Test("Streaming decode equals decode", arguments: Fixtures.all)
    func fixtures(_ fixture: Fixture) throws {
        let made = try fixture.made()
        try QemuImg.convert(made, to: raw)
        let words = made.openOptions.joined(separator: " ")
        let result = try Command.run([
            "bash", "-c", "cat \(made.image) | \(program) convert \(words) - \(target)",
        ])
        if result.errors.contains("not looked for from a pipe") {
            // It needs other files.
            return #expect(result.status == 1 && access(target, F_OK) != 0, "\(result)")
        }
        #expect(result.status == 0, "\(result)")
        #expect(try QemuImg.difference(raw, target, imageFormat: "raw") == nil)
    }

    @Test("an image whose clusters lie far out of order needs --spool")
    func outOfOrder() throws {
        try QemuImg.create(image, size: 200.MiB)
        try QemuImg.io(image, ["write -q -P 1 40M 160M", "write -q -P 2 0 40M"])
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        try expectFailure("cat \(image) | \(program) convert - \(target)", naming: "--spool")
        let place = try folder.directory("spool")
        try Command.shell("cat \(image) | \(program) convert --spool \(place) - \(target)")
        try Command.require("cmp", raw, target)
        // A file is a file, also as standard input.
        try Command.shell("\(program) convert - - < \(image) | cmp - \(raw)")
    }

    @Test("an image that ends early is an error, and leaves no target")
    func cutShort() throws {
        let source = folder.file("source.qcow2")
        for flags in ["", "-c", "-o cluster_size=512"] {
            try Command.shell("qemu-img convert \(flags) -O qcow2 \(raw) \(source)")
            let size = try TestFile(source, O_RDONLY).byteCount()
            for count in [3, 100, 65536, 200_000, 300_001, size / 2, size - 70_000] {
                try expectFailure(
                    "head -c \(count) \(source) | \(program) convert -f qcow2 - \(target)",
                    naming: "standard input")
            }
        }
    }

    @Test("an image that needs other files is refused from a pipe")
    func otherFiles() throws {
        let top = folder.file("top.qcow2")
        try QemuImg.create(top, backing: "disk.qcow2")
        try expectFailure("cat \(top) | \(program) convert - \(target)", naming: "backing file")
        try expectFailure(
            "cat \(image) | \(program) convert -l one - \(target)", naming: "snapshot")
    }
}
