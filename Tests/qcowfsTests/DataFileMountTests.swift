import Foundation
import TestSupport
import Testing

/// Images with an external data file, made by QEMU, through a real mount.
@Suite("External data files, mounted", .serialized, .enabledWhereMountable)
struct DataFileMountTests {
    let folder: TemporaryDirectory
    let image: String
    let data: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
        data = folder.file("disk.data")
    }

    struct Fixture: Sendable, CustomTestStringConvertible {
        var options: [String]
        var hasBacking = false
        var testDescription: String {
            options.joined(separator: ",") + (hasBacking ? " with backing" : "")
        }
        var isRaw: Bool { options.contains("data_file_raw=on") }

        static let all: [Fixture] =
            [512, 4096, 65536, 2 << 20].flatMap { size in
                [
                    Fixture(options: ["cluster_size=\(size)"]),
                    Fixture(options: ["cluster_size=\(size)", "data_file_raw=on"]),
                ]
            } + [
                Fixture(options: [], hasBacking: true),
                Fixture(options: ["preallocation=metadata"]),
                Fixture(options: ["preallocation=full"]),
                Fixture(options: ["lazy_refcounts=on", "refcount_bits=1"]),
            ]
    }

    private func make(_ fixture: Fixture) throws {
        let size = 6.MiB + 1536
        var backing: String?
        if fixture.hasBacking {
            backing = "base.qcow2"
            try makeImage(
                folder.file("base.qcow2"), size: size, commands: ["write -q -P 0x33 0 5M"])
        }
        try QemuImg.create(
            image, size: size, options: ["data_file=\(data)"] + fixture.options, backing: backing)
        try QemuImg.io(
            image,
            [
                "write -q -P 0x11 0 1M", "write -q -P 0x12 3000k 777k", "write -q -z 64k 128k",
                "write -q -z -u 512k 64k", "discard -q 768k 64k", "write -q -P 0x13 6M 1536",
                "write -q -z 5M 700k",
            ])
    }

    @Test(
        "Appendix: the mount reads what qemu-img reads, with its holes, and writes beside QEMU",
        arguments: Fixture.all)
    func fixture(_ fixture: Fixture) throws {
        try make(fixture)
        let raw = folder.file("model.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        let model = try ReferenceDisk(contentsOf: raw)
        let mapped = try QemuImg.dataRanges(image)
        let mount = try TestMount(image, in: folder)
        do {
            let file = try mount.open()
            try expectEqual(file, model)
            #expect(try file.dataRanges() == mapped)
            for (start, count) in [(100, 1), (700_000, 300_000), (5.MiB, 3), (6.MiB - 5, 1000)] {
                let bytes = [UInt8](repeating: UInt8(count & 0xFF) | 1, count: count)
                try file.write(bytes, at: start)
                bytes.withUnsafeBytes { model.write($0, at: start) }
            }
            try file.punch(200_000..<2.MiB)
            model.zero(200_000..<2.MiB)
            try file.zero(3.MiB..<3.MiB + 100_000)
            model.zero(3.MiB..<3.MiB + 100_000)
            try file.allocate(0, 4.MiB..<4.MiB + 100_000)
            try file.sync()
            try expectEqual(file, model)
        }
        try mount.unmount()
        try judge(model, fixture)
    }

    private func judge(_ model: ReferenceDisk, _ fixture: Fixture) throws {
        let raw = folder.file("model.raw")
        try model.save(to: raw)
        #expect(try QemuImg.difference(raw, image) == nil)
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
        let ours = try qcowfs("check", image)
        #expect(ours.status == 0, "\(ours)")
        // QEMU lets a file of its making end with a cluster; the rest is zeros.
        if fixture.isRaw { #expect(try QemuImg.difference(raw, data, imageFormat: "raw") == nil) }
    }

    private func expectEqual(
        _ file: TestFile, _ model: ReferenceDisk, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let bytes = try file.read(0..<model.byteCount)
        let place = bytes.withUnsafeBytes {
            model.firstDifference(in: 0..<model.byteCount, from: $0)
        }
        #expect(place == nil, sourceLocation: sourceLocation)
    }

    @Test("Trap 20: a relative data file is found beside the image, from any directory")
    func relative() throws {
        try Command.shell(
            "cd \(folder.path) && qemu-img create -q -f qcow2 -o data_file=disk.data disk.qcow2 1M")
        try Command.shell("cd \(folder.path) && qemu-io -c 'write -q -P 5 0 64k' disk.qcow2")
        let mount = try TestMount(image, in: folder)
        #expect(try holds(mount.open(), 0..<65536, 5))
        try mount.unmount()
    }

    @Test("A data file elsewhere is refused by name, and opened where the user allows it")
    func policy() throws {
        let elsewhere = try TemporaryDirectory()
        let path = elsewhere.file("disk.data")
        try QemuImg.create(image, size: 1.MiB, options: ["data_file=\(path)"])
        try QemuImg.io(image, ["write -q -P 6 0 64k"])
        try expectMountRefused(
            image, in: folder, naming: ["disk.qcow2", path, "--allow-path", "--trust-paths"])
        for options in [["--allow-path", elsewhere.path], ["--trust-paths"]] {
            let mount = try TestMount(image, in: folder, options: options)
            #expect(try holds(mount.open(), 0..<65536, 6))
            try mount.unmount()
        }
    }

    @Test("A data file that is missing, or not named, is refused by name")
    func missing() throws {
        try QemuImg.create(image, size: 1.MiB, options: ["data_file=\(data)"])
        unlink(data)
        try expectMountRefused(image, in: folder, naming: ["disk.qcow2", "data file", data])
        #expect(try qcowfs("info", image).output.contains("data file: \(data)"))
        #expect(try qcowfs("check", image).status == 0)
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.incompatibleFeatures = 4
        _ = try folder.write(builder.build(), to: "disk.qcow2")
        try expectMountRefused(image, in: folder, naming: ["disk.qcow2", "data file", "not name"])
    }

    @Test("While an image is mounted, its data file is locked as QEMU locks it")
    func locks() throws {
        try QemuImg.create(image, size: 1.MiB, options: ["data_file=\(data)"])
        let mount = try TestMount(image, in: folder)
        for words in [["-f", "raw", data], ["-f", "qcow2", image]] {
            let result = try Command.run(["qemu-io", "-c", "write 0 512"] + words)
            #expect(result.status != 0 && result.description.contains("lock"), "\(result)")
        }
        try mount.unmount()
        try whileQEMUHas(data, format: "raw") { _ in
            expectRefusal(
                try qcowfs("mount", image, folder.file("mnt")), naming: "disk.data", "qemu-io")
        }
        // Both may read.
        let reader = try TestMount(image, in: folder, options: ["--read-only"])
        try QemuImg.io(image, ["read -q 0 64k"], flags: ["-r"])
        try reader.unmount()
    }

    @Test("The disk grows and shrinks with its data file", arguments: [false, true])
    func resizes(raw: Bool) throws {
        try QemuImg.create(
            image, size: 1.MiB,
            options: ["data_file=\(data)"] + (raw ? ["data_file_raw=on"] : []))
        try QemuImg.io(image, ["write -q -P 7 0 1M"])
        let mount = try TestMount(image, in: folder, options: ["-o", "shrink"])
        do {
            let file = try mount.open()
            try file.truncate(to: 100_352)
            #expect(try TestFile(data, O_RDONLY).byteCount() == 100_352)
            try file.truncate(to: 3.MiB)
            #expect(try TestFile(data, O_RDONLY).byteCount() == 3.MiB)
            #expect(try holds(file, 0..<100_352, 7) && holds(file, 100_352..<3.MiB, 0))
            try file.write([8], at: 3.MiB - 1)
        }
        try mount.unmount()
        #expect(try QemuImg.check(image).status == 0)
        try QemuImg.io(
            image, ["read -q -P 7 0 98k", "read -q -P 0 98k 2M", "read -q -P 8 3145727 1"])
    }

    @Test("A read-only mount changes neither file")
    func readOnly() throws {
        try QemuImg.create(image, size: 1.MiB, options: ["data_file=\(data)"])
        try QemuImg.io(image, ["write -q -P 7 0 1M"])
        let before = try Command.require("sha256sum", image, data)
        let mount = try TestMount(image, in: folder, options: ["--read-only"])
        #expect(try holds(mount.open(O_RDONLY), 0..<1.MiB, 7))
        try mount.unmount()
        #expect(try Command.require("sha256sum", image, data) == before)
    }

    // MARK: Making one

    @Test(
        "create makes the data file, as qemu-img does",
        arguments: [
            ["data_file=disk.data"], ["data_file=disk.data,data_file_raw=on"],
            ["data_file=disk.data,preallocation=metadata,cluster_size=4k"],
            ["data_file=disk.data,preallocation=falloc,data_file_raw=on"],
            ["data_file=disk.data,preallocation=full,refcount_bits=64"],
        ])
    func creates(options: [String]) throws {
        let words = options.flatMap { ["-o", $0] }
        try Command.require([TestEnvironment.program, "create"] + words + [image, "3M"])
        let theirs = try folder.directory("theirs")
        try Command.shell(
            "cd \(theirs) && qemu-img create -q -f qcow2 \(words.joined(separator: " ")) "
                + "disk.qcow2 3M")
        func info(_ folder: String) throws -> [Substring] {
            try Command.shell("cd \(folder) && qemu-img info disk.qcow2").split(separator: "\n")
                .filter { !$0.hasPrefix("disk size") }
        }
        #expect(try info(folder.path) == info(theirs))
        #expect(try TestFile(data, O_RDONLY).byteCount() == 3.MiB)
        #expect(
            try Command.shell(
                "cd \(folder.path) && qemu-img check disk.qcow2 && qemu-io "
                    + "-c 'read -q -P 0 0 3M' -c 'write -q -P 9 1M 1M' disk.qcow2"
            ).contains("No errors"))
        if options[0].contains("falloc") || options[0].contains("full") {
            #expect(try TestFile(data, O_RDONLY).status().st_blocks * 512 >= 3.MiB)
        }
        let mount = try TestMount(image, in: folder)
        #expect(try holds(mount.open(), 1.MiB..<2.MiB, 9))
        try mount.unmount()
    }

    @Test("create replaces a data file by a new one, never one in use, and leaves nothing behind")
    func replaces() throws {
        _ = try folder.write([UInt8](repeating: 1, count: 4096), to: "disk.data")
        try whileQEMUHas(data, format: "raw") { _ in
            let result = try qcowfs("create", "-o", "data_file=disk.data", image, "1M")
            expectRefusal(result, naming: "disk.data", "qemu-io")
        }
        unlink(image)
        try Command.require(
            TestEnvironment.program, "create", "-o", "data_file=disk.data", image, "1M")
        #expect(try TestFile(data, O_RDONLY).read(0..<4096).allSatisfy { $0 == 0 })
        #expect(try Command.shell("ls -A \(folder.path)") == "disk.data\ndisk.qcow2\n")
    }

    @Test("A write that only the data file sees moves the disk's time", arguments: [false, true])
    func times(isRaw: Bool) throws {
        try make(Fixture(options: isRaw ? ["data_file_raw=on"] : []))
        let mount = try TestMount(image, in: folder)
        do {
            let file = try mount.open()
            try file.write([1], at: 0)
            try file.sync()
            var past = [timespec](repeating: timespec(tv_sec: 1_000_000_000, tv_nsec: 0), count: 2)
            for path in [image, data] { try #require(utimensat(AT_FDCWD, path, &past, 0) == 0) }
            #expect(try eventually { try file.status().st_mtim.tv_sec == 1_000_000_000 })
            try file.write([2], at: 0)
            try file.sync()
            let expected = try TestFile(data, O_RDONLY).status().st_mtim.tv_sec
            #expect(expected > 1_000_000_000)
            #expect(try eventually { try file.status().st_mtim.tv_sec == expected })
        }
        try mount.unmount()
    }
}
