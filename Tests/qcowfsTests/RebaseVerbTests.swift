import Glibc
import TestSupport
import Testing

/// `rebase`: another backing file, the same disk.
@Suite("Changing the backing file", .needsQemuImg)
struct RebaseVerbTests {
    let folder: TemporaryDirectory
    let top: String
    let before: String

    init() throws {
        folder = try TemporaryDirectory()
        top = folder.file("top.qcow2")
        before = folder.file("before.raw")
        try makeImage(
            folder.file("old.qcow2"), commands: ["write -q -P 1 0 2M", "write -q -P 2 4M 64k"])
        try makeImage(
            folder.file("new.qcow2"), size: 10.MiB,
            commands: ["write -q -P 1 0 1M", "write -q -P 3 3M 1M", "write -q -P 4 9M 64k"])
        try makeImage(folder.file("short.qcow2"), size: 1.MiB, commands: ["write -q -P 5 0 1M"])
    }

    private func makeTop(compat: String = "1.1", backing: String = "old.qcow2") throws {
        try QemuImg.create(top, size: 10.MiB, options: ["compat=\(compat)"], backing: backing)
        try QemuImg.io(top, ["write -q -P 9 64k 64k", "write -q -P 8 7M 100k"])
        try QemuImg.convert(top, to: before, from: "qcow2", format: "raw")
    }

    private func expectSameDisk(backing: String?) throws {
        #expect(try QemuImg.difference(before, top) == nil)
        #expect(try QemuImg.check(top).status == 0)
        let info = try Command.require("qemu-img", "info", top)
        if let backing {
            #expect(info.contains("backing file: \(backing)"))
        } else {
            #expect(!info.contains("backing file"))
        }
    }

    @Test(
        "the disk is the same over the new backing file",
        arguments: ["new.qcow2", "short.qcow2"], ["0.10", "1.1"])
    func safe(backing: String, compat: String) throws {
        try makeTop(compat: compat)
        #expect(try qcowfs("rebase", "-b", backing, "-F", "qcow2", top).status == 0)
        try expectSameDisk(backing: backing)
    }

    @Test("the disk is the same over a raw file, whose format is found out")
    func raw() throws {
        try makeTop()
        try QemuImg.convert(
            folder.file("new.qcow2"), to: folder.file("new.raw"), from: "qcow2", format: "raw")
        #expect(try qcowfs("rebase", "-b", "new.raw", top).status == 0)
        try expectSameDisk(backing: "new.raw")
    }

    @Test("the disk is the same without a backing file", arguments: ["0.10", "1.1"])
    func none(compat: String) throws {
        try makeTop(compat: compat)
        #expect(try qcowfs("rebase", "-b", "", top).status == 0)
        try expectSameDisk(backing: nil)
    }

    @Test("zeros of a short backing file stay zeros over a longer one")
    func zeros() throws {
        try makeTop(backing: "short.qcow2")
        #expect(try qcowfs("rebase", "-b", "new.qcow2", "-F", "qcow2", top).status == 0)
        try expectSameDisk(backing: "new.qcow2")
        // They take no room for data.
        #expect(try !QemuImg.dataRanges(top).contains { $0.contains(9.MiB) })
    }

    @Test(
        "the disk is the same for every kind of image, whatever lies where",
        arguments: [
            "cluster_size=512", "compat=0.10,cluster_size=4k", "extended_l2=on,cluster_size=16k",
            "extended_l2=on", "data_file=top.data", "data_file=top.data,extended_l2=on",
            "compression_type=zstd",
        ], 0..<3 as Range<UInt64>)
    func anything(kind: String, round: UInt64) throws {
        var random = RepeatableRandom(seed: TestEnvironment.seed &+ round)
        func fill(_ image: String, options: [String] = [], backing: String? = nil) throws {
            let size = 256.KiB + random.number(below: 512) * 512
            try QemuImg.create(
                image, size: backing == nil ? size : 400.KiB, options: options, backing: backing)
            try QemuImg.io(
                image,
                (0..<12).map { _ in
                    let verb = ["write -q -P 1", "write -q -P 2", "write -q -z", "discard -q"]
                    let place = random.number(below: 500)
                    let length = 1 + random.number(below: random.chance(oneIn: 3) ? 200 : 20)
                    let count = min(length, (backing == nil ? size : 400.KiB) / 512 - place)
                    return "\(verb[random.number(below: 4)]) \(place * 512) \(count * 512)"
                })
        }
        for name in ["a.qcow2", "b.qcow2"] {
            try fill(folder.file(name), options: ["cluster_size=\(512 << random.number(below: 8))"])
        }
        let options = kind.split(separator: ",").map {
            String($0).replacing("top.data", with: folder.file("top.data"))
        }
        try fill(top, options: options, backing: "a.qcow2")
        try QemuImg.convert(top, to: before, from: "qcow2", format: "raw")
        for backing in ["b.qcow2", "a.qcow2", ""] {
            let result = try qcowfs("rebase", "-b", backing, top)
            #expect(result.status == 0, "seed \(TestEnvironment.seed): \(result)")
            try expectSameDisk(backing: backing.isEmpty ? nil : backing)
        }
    }

    @Test("-u changes the header alone, and needs no file, but a format")
    func unsafe() throws {
        try makeTop()
        #expect(try qcowfs("rebase", "-u", "-b", "gone.qcow2", "-F", "qcow2", top).status == 0)
        #expect(try Command.require("qemu-img", "info", top).contains("gone.qcow2"))
        #expect(try qcowfs("rebase", "-u", "-b", "old.qcow2", "-F", "qcow2", top).status == 0)
        try expectSameDisk(backing: "old.qcow2")
    }

    @Test("a new backing file that is missing changes nothing")
    func missing() throws {
        try makeTop()
        let sum = try Command.require("sha256sum", top)
        expectRefusal(
            try qcowfs("rebase", "-b", "gone.qcow2", "-F", "qcow2", top), naming: "gone.qcow2")
        #expect(try Command.require("sha256sum", top) == sum)
    }

    @Test(
        "encrypted files above and below are opened with their passphrases",
        arguments: [
            [true, true], [false, true], [true, false],
        ])
    func encrypted(isEncrypted: [Bool]) throws {
        var old = EncryptedImage(folder.file("closed.qcow2"), passphrase: "the old one's")
        old.isEncrypted = isEncrypted[1]
        try old.create(size: 10.MiB)
        try old.io(["write -q -P 1 0 2M", "write -q -P 2 4M 64k"])
        var overlay = EncryptedImage(top)
        overlay.isEncrypted = isEncrypted[0]
        if isEncrypted[1] { overlay.encryptedBelow = [("backing", "the old one's", "luks")] }
        try overlay.create(size: 10.MiB, backing: "closed.qcow2")
        try overlay.io(["write -q -P 9 64k 64k", "write -q -P 8 7M 100k"])
        let disk = try overlay.disk(in: folder)

        let sum = try Command.require("sha256sum", top)
        expectRefusal(
            try qcowfs("rebase", "-b", "new.qcow2", "-F", "qcow2", top),
            naming: "encrypted", "--passphrase-file")
        #expect(try Command.require("sha256sum", top) == sum)
        let first = try folder.write(Array("open sesame".utf8), to: "first")
        let second = try folder.write(Array("the old one's".utf8), to: "second")
        let passphrases = ["--passphrase-file", first, "--passphrase-file", second]
        // There and back: each of them is the new backing file once.
        for backing in ["new.qcow2", "closed.qcow2"] {
            try Command.require(
                [TestEnvironment.program, "rebase"] + passphrases
                    + ["-b", backing, "-F", "qcow2", top])
            if backing == "new.qcow2" {
                overlay.encryptedBelow = []
            } else if isEncrypted[1] {
                overlay.encryptedBelow = [("backing", "the old one's", "luks")]
            }
            let now = try overlay.disk(in: folder)
            #expect(
                disk.firstDifference(
                    in: 0..<10.MiB, from: UnsafeRawBufferPointer(now[0..<10.MiB])) == nil)
            #expect(try overlay.check().status == 0)
        }
    }
}
