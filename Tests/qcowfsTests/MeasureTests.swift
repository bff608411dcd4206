import TestSupport
import Testing

/// `measure`, with QEMU as the judge.
@Suite("Measuring", .needsQemuImg)
struct MeasureTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    private func expectSame(
        _ words: [String], sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let words = ["measure", "-O", "qcow2"] + words
        #expect(
            try Command.require([TestEnvironment.program] + words)
                == Command.require(["qemu-img"] + words), "\(words)",
            sourceLocation: sourceLocation)
    }

    @Test(
        "what was allocated and never written counts as QEMU counts it",
        arguments: ["off", "metadata", "falloc", "full"],
        [
            [], ["extended_l2=on"], ["cluster_size=4k"], ["data_file=disk.data"],
            ["data_file=disk.data", "data_file_raw=on"],
        ])
    func preallocated(mode: String, options: [String]) throws {
        let options = options.map { $0.replacing("disk.data", with: folder.file("disk.data")) }
        for commands in [
            [], ["write -q -P 1 1M 64k", "write -q -P 2 2M 512", "write -q -z 1M 4k"],
            ["write -q -P 1 0 3M", "write -q -z 64k 1M", "discard -q 2M 100k"],
        ] {
            try QemuImg.create(
                image, size: 20.MiB, options: options + ["preallocation=\(mode)"])
            if !commands.isEmpty { try QemuImg.io(image, commands) }
            for target in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"] {
                try expectSame(["-o", target, image])
            }
        }
    }

    @Test("a chain and a raw file with holes count as QEMU counts them")
    func below() throws {
        let raw = folder.file("base.raw")
        try makeImage(image, size: 20.MiB, options: ["preallocation=metadata"])
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        try expectSame(["-f", "raw", raw])
        for (base, format) in [("disk.qcow2", "qcow2"), ("base.raw", "raw")] {
            let top = folder.file("top-\(format).qcow2")
            try QemuImg.create(top, size: 30.MiB, backing: base, backingFormat: format)
            try QemuImg.io(top, ["write -q -P 1 5M 100k", "write -q -z 64k 64k"])
            try expectSame([top])
        }
    }

    @Test(
        "a disk that no image can hold is refused, as QEMU refuses it",
        arguments: [
            ["--size", "1E"], ["-o", "cluster_size=512", "--size", "10T"],
            ["-o", "extended_l2=on", "--size", "40P"], ["--size", "9223372036854775807"],
        ])
    func tooLarge(words: [String]) throws {
        let words = ["measure", "-O", "qcow2"] + words
        expectRefusal(try Command.run([TestEnvironment.program] + words), naming: "too many")
        #expect(try Command.run(["qemu-img"] + words).status == 1)
    }

    @Test("the largest disks that an image can hold are measured")
    func largest() throws {
        try expectSame(["-o", "cluster_size=512", "--size", "128G"])
        try expectSame(["--size", "2P"])
        try expectSame(["-o", "cluster_size=2M", "--size", "1E"])
    }
}
