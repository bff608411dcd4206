import Glibc
import TestSupport
import Testing

/// `compact`: the file ends behind its last cluster, and says what was done.
@Suite("Compacting", .needsQemuImg)
struct CompactVerbTests {
    let folder: TemporaryDirectory
    let image: String
    let before: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
        before = folder.file("before.raw")
    }

    /// An image of 32 MiB whose first half is free.
    private func make(_ options: [String] = []) throws {
        try makeImage(image, size: 64.MiB, options: options, commands: ["write -q -P 1 0 32M"])
        try QemuImg.io(image, ["discard -q 0 16M"])
        try QemuImg.convert(image, to: before, from: "qcow2", format: "raw")
    }

    private func expectSame(sourceLocation: SourceLocation = #_sourceLocation) throws {
        #expect(try QemuImg.difference(before, image) == nil, sourceLocation: sourceLocation)
        #expect(try QemuImg.check(image).status == 0, sourceLocation: sourceLocation)
    }

    @Test("it says how long the file was and is, for people and as JSON")
    func says() throws {
        try make()
        let old = try TestFile(image, O_RDONLY).byteCount()
        let copy = folder.file("copy.qcow2")
        try Command.require("cp", image, copy)
        let text = try qcowfs("compact", copy)
        #expect(text.status == 0 && text.errors.isEmpty, "\(text)")
        #expect(text.output.hasPrefix("256 clusters moved. The file has 16.3 MiB now, "))
        let json = try qcowfs("compact", "--json", image)
        #expect(json.status == 0)
        try expectSame()
        let new = try TestFile(image, O_RDONLY).byteCount()
        #expect(new < 17.MiB)
        for line in [
            "\"filename\": \"\(image)\"", "\"old-file-size\": \(old)", "\"new-file-size\": \(new)",
            "\"moved-clusters\": 256", "\"leaks-fixed\": 0",
        ] { #expect(json.output.contains(line), "\(json)") }
    }

    @Test("it says that nothing is to be done, and leaves the file as it is")
    func nothing() throws {
        try make()
        #expect(try qcowfs("compact", image).status == 0)
        let sum = try Command.require("sha256sum", image)
        let again = try qcowfs("compact", image)
        #expect(again.status == 0 && again.output.hasPrefix("Nothing to do"), "\(again)")
        #expect(try Command.require("sha256sum", image) == sum)
    }

    @Test("after discard it gives back what was full of zeros")
    func afterDiscard() throws {
        try make()
        try QemuImg.io(image, ["write -q -P 0 20M 10M"])
        try QemuImg.convert(image, to: before, from: "qcow2", format: "raw")
        #expect(try qcowfs("discard", image).status == 0)
        #expect(try qcowfs("compact", image).status == 0)
        try expectSame()
        #expect(try TestFile(image, O_RDONLY).byteCount() < 7.MiB)
    }

    @Test("Ctrl-C leaves a sound image, and says so")
    func interrupted() throws {
        try makeImage(
            image, size: 1024.MiB, options: ["cluster_size=512"],
            commands: ["write -q -P 1 0 64M", "discard -q 0 32M"])
        try QemuImg.convert(image, to: before, from: "qcow2", format: "raw")
        let result = try Command.run([
            "bash", "-c",
            "\(TestEnvironment.program) compact \(image) & sleep 0.1; kill -INT $!; wait $!",
        ])
        // It may have been faster than the signal.
        if result.status != 0 {
            expectRefusal(result, naming: "interrupted", "the image is whole")
        }
        try expectSame()
    }

    @Test("an image in use, corrupt or of another format is refused and unchanged")
    func refusals() throws {
        try make()
        let sum = try Command.require("sha256sum", image)
        try whileQEMUHas(image) { _ in
            expectRefusal(try qcowfs("compact", image), naming: image, "in use")
        }
        expectRefusal(try qcowfs("compact", before), naming: "not a qcow2 image")
        #expect(try Command.require("sha256sum", image) == sum)
        try TestFile(image, O_WRONLY).write([2], at: 79)
        expectRefusal(try qcowfs("compact", image), naming: "marked corrupt", "check --repair all")
    }

    @Test("an image that was not closed is settled first")
    func dirty() throws {
        try make(["lazy_refcounts=on"])
        try TestFile(image, O_WRONLY).write([1], at: 79)
        #expect(try qcowfs("compact", image).status == 0)
        try expectSame()
    }

    @Test("a mounted image is refused, naming the daemon", .enabledWhereMountable)
    func mounted() throws {
        try make()
        let mount = try TestMount(image, in: folder)
        expectRefusal(
            try qcowfs("compact", image), naming: "in use", "qcowfs", "\(try mount.daemon())")
        try mount.unmount()
        #expect(try qcowfs("compact", image).status == 0)
        try expectSame()
    }

    @Test("what is encrypted by its place is encrypted anew, with the passphrase")
    func encrypted() throws {
        let file = EncryptedImage(image)
        try file.create(size: 24.MiB)
        try file.io(["write -q -P 1 0 12M"])
        try file.snapshot("-c", "kept")
        try file.io(["write -q -P 2 2M 1M", "write -q -P 3 12M 6M", "discard -q 12M 4M"])
        let disk = try file.disk(in: folder)
        try disk.save(to: before)
        let kept = folder.file("kept.raw")
        try file.disk(in: folder, snapshot: "kept").save(to: kept)
        let sum = try Command.require("sha256sum", image)
        expectRefusal(try qcowfs("compact", image), naming: image, "passphrase")
        #expect(try Command.require("sha256sum", image) == sum)
        let old = try TestFile(image, O_RDONLY).byteCount()
        let passphrase = try folder.write(Array("open sesame".utf8), to: "passphrase")
        let result = try qcowfs("compact", "--passphrase-file", passphrase, image)
        #expect(result.status == 0, "\(result)")
        #expect(try TestFile(image, O_RDONLY).byteCount() < old - 3.MiB)
        #expect(try file.check().status == 0)
        #expect(try file.difference(from: before) == nil)
        try file.snapshot("-a", "kept")
        #expect(try file.difference(from: kept) == nil)
    }
}
