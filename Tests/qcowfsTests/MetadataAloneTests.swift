import Foundation
import TestSupport
import Testing

/// Verbs that need metadata alone ask for no passphrase, and do not look at the backing file.
@Suite("Without guest data", .needsQemuImg)
struct MetadataAloneTests {
    private let folder: TemporaryDirectory

    init() throws { folder = try TemporaryDirectory() }

    private func run(_ words: String...) throws {
        try Command.require([TestEnvironment.program] + words)
    }

    @Test("Snapshots of an encrypted image come, go and are applied without its passphrase")
    func encryptedSnapshots() throws {
        let image = EncryptedImage(folder.file("disk.qcow2"))
        try image.create(size: 8.MiB)
        try image.io(["write -q -P 0xA1 0 128k"])
        try run("snapshot", "-c", "first", image.path)
        try image.io(["write -q -P 0xB1 0 128k"])
        try run("snapshot", "-c", "second", image.path)
        #expect(try qcowfs("snapshot", "-l", image.path).output.contains(" second "))
        try run("snapshot", "-a", "first", image.path)
        try image.io(["read -q -P 0xA1 0 128k"])
        try run("snapshot", "-d", "second", image.path)
        try run("bitmap", "--add", image.path, "bits")
        try run("map", image.path)
        try run("measure", "-O", "qcow2", image.path)
        let check = try image.check()
        #expect(check.status == 0, "\(check)")
    }

    @Test("Snapshots, bitmaps and amendments of an image whose backing file is missing")
    func missingBacking() throws {
        let (base, image) = (folder.file("base.qcow2"), folder.file("disk.qcow2"))
        try makeImage(base)
        try QemuImg.create(image, options: ["lazy_refcounts=on"], backing: base)
        try QemuImg.io(image, ["write -q -P 0xA3 64k 64k"])
        try Command.require("mv", base, base + ".away")
        try run("snapshot", "-c", "first", image)
        try run("snapshot", "-c", "second", image)
        try run("snapshot", "-a", "first", image)
        try run("snapshot", "-d", "second", image)
        try run("bitmap", "--add", image, "bits")
        try run("bitmap", "--remove", image, "bits")
        // As a crash leaves it: amending rebuilds the counts first.
        let file = try TestFile(image, O_RDWR)
        try file.write([1], at: 79)
        try run("amend", "-o", "lazy_refcounts=off", image)
        #expect(try file.read(72..<88).allSatisfy { $0 == 0 })
        // What a new size makes visible is asked of the backing file.
        expectRefusal(try qcowfs("resize", image, "16M"), naming: "base.qcow2")
        try Command.require("mv", base + ".away", base)
        #expect(try QemuImg.check(image).status == 0)
        try QemuImg.io(
            image, ["read -q -P 0xA1 0 64k", "read -q -P 0xA3 64k 64k", "read -q -P 0xA2 1M 64k"])
    }

    @Test(
        "measure counts the LUKS header as qemu-img does",
        arguments: [
            [], ["cluster_size=512"], ["cluster_size=2M"], ["encrypt.cipher-alg=aes-128"],
            ["encrypt.cipher-mode=cbc", "encrypt.ivgen-alg=essiv", "preallocation=falloc"],
        ])
    func measuresLUKS(options: [String]) throws {
        let image = EncryptedImage(folder.file("disk.qcow2"))
        try image.create(size: 8.MiB)
        try image.io(["write -q -P 0xA1 0 300k"])
        let wanted = (["encrypt.format=luks"] + options).joined(separator: ",")
        // It counts the bytes of a header that it makes; how slow that is tells nothing.
        let secret = ["--object", "secret,id=s,data=x"]
        let theirOptions = wanted + ",encrypt.key-secret=s,encrypt.iter-time=10"
        let source = image.secrets + ["--image-opts", image.options]
        let forms: [(ours: [String], theirs: [String])] = [
            (["--size", "1G"], ["--size", "1G"]), ([image.path], source),
        ]
        for (ours, theirs) in forms {
            let mine = try Command.require(
                [TestEnvironment.program, "measure", "-O", "qcow2", "--json", "-o", wanted] + ours)
            let words =
                ["qemu-img", "measure", "-O", "qcow2", "--output=json"] + secret
                + ["-o", theirOptions] + theirs
            #expect(try sizes(mine) == sizes(Command.require(words)), "\(ours)")
        }
    }

    private func sizes(_ json: String) throws -> [String: Int]? {
        try JSONSerialization.jsonObject(with: Data(json.utf8)) as? [String: Int]
    }

    @Test("A downgrade that bitmaps forbid names the way out")
    func downgradeWithBitmaps() throws {
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        try run("bitmap", "--add", image, "bits")
        expectRefusal(
            try qcowfs("amend", "-o", "compat=0.10", image), naming: "bitmaps", "bitmap --remove")
        try run("bitmap", "--remove", image, "bits")
        try run("amend", "-o", "compat=0.10", image)
        #expect(try QemuImg.check(image).status == 0)
    }
}
