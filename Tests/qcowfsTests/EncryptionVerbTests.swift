import Foundation
import TestSupport
import Testing

/// Encrypted images on the command line: where the passphrase comes from, and what the verbs say.
@Suite("Encrypted images on the command line", .serialized, .enabledWhereMountable)
struct EncryptionVerbTests {
    let folder: TemporaryDirectory
    let image: EncryptedImage
    let passphraseFile: String

    init() throws {
        folder = try TemporaryDirectory()
        image = EncryptedImage(folder.file("disk.qcow2"))
        passphraseFile = try folder.write(Array("open sesame\n".utf8), to: "passphrase")
    }

    private func makeImage() throws {
        try image.create(size: 8.MiB)
        try image.io(["write -q -P 0xA1 0 128k", "write -q -P 0xA2 1M 64k"])
    }

    @Test("A LUKS image is mounted with --passphrase-file, read and written, and QEMU agrees")
    func mount() throws {
        try makeImage()
        for options in [
            ["--passphrase-file", passphraseFile], ["-o", "passphrase-file=\(passphraseFile)"],
        ] {
            let mount = try TestMount(image.path, in: folder, options: options)
            #expect(try holds(mount.open(O_RDONLY), 0..<128.KiB, 0xA1))
            let file = try mount.open()
            try file.write([UInt8](repeating: 0xC3, count: 5000), at: 2.MiB + 77)
            try file.sync()
            #expect(try holds(file, 2.MiB + 77..<2.MiB + 5077, 0xC3))
        }
    }

    @Test("What a mount wrote, QEMU decrypts")
    func written() throws {
        try makeImage()
        let model = try image.disk(in: folder)
        let mount = try TestMount(
            image.path, in: folder, options: ["--passphrase-file", passphraseFile])
        do {
            let file = try mount.open()
            let bytes = [UInt8](repeating: 0xC3, count: 300_001)
            try file.write(bytes, at: 777)
            bytes.withUnsafeBytes { model.write($0, at: 777) }
            try file.punch(1.MiB..<1.MiB + 1000)
            model.zero(1.MiB..<1.MiB + 1000)
        }
        try mount.unmount()
        let raw = folder.file("model.raw")
        try model.save(to: raw)
        #expect(try image.difference(from: raw) == nil)
        let check = try image.check()
        #expect(check.status == 0, "\(check)")
    }

    @Test("A wrong passphrase, none, and a file that is not there, each in one sentence")
    func refusals() throws {
        try makeImage()
        let wrong = try folder.write(Array("sesame".utf8), to: "wrong")
        let before = try TestFile(image.path, O_RDONLY).read(0..<(16.MiB))
        try expectMountRefused(
            image.path, in: folder, options: ["--passphrase-file", wrong],
            naming: ["disk.qcow2", "passphrase is wrong"])
        try expectMountRefused(
            image.path, in: folder, naming: ["disk.qcow2", "encrypted", "--passphrase-file"])
        try expectMountRefused(
            image.path, in: folder, options: ["--read-only"], naming: ["--passphrase-file"])
        try expectMountRefused(
            image.path, in: folder, options: ["--passphrase-file", folder.file("none")],
            naming: ["none"])
        #expect(try TestFile(image.path, O_RDONLY).read(0..<(16.MiB)) == before)
    }

    @Test("Legacy AES is mounted read-only, and refused for writing with the way out")
    func legacyAES() throws {
        var legacy = image
        legacy.format = "aes"
        try legacy.create(size: 1.MiB)
        try legacy.io(["write -q -P 0x5A 64k 64k"])
        try expectMountRefused(
            image.path, in: folder, options: ["--passphrase-file", passphraseFile],
            naming: ["AES", "--read-only"])
        let mount = try TestMount(
            image.path, in: folder, options: ["-r", "--passphrase-file", passphraseFile])
        #expect(try holds(mount.open(O_RDONLY), 64.KiB..<128.KiB, 0x5A))
    }

    @Test("Several passphrases: each encrypted file of a chain finds its own, in any order")
    func chain() throws {
        let base = EncryptedImage(folder.file("base.qcow2"), passphrase: "the base's")
        try base.create(size: 8.MiB)
        try base.io(["write -q -P 0xB1 0 1M"])
        var top = image
        top.encryptedBelow = [("backing", "the base's", "luks")]
        try top.create(size: 8.MiB, backing: "base.qcow2")
        try top.io(["write -q -P 0xB2 64k 64k"])
        let second = try folder.write(Array("the base's".utf8), to: "second")
        for files in [[passphraseFile, second], [second, passphraseFile]] {
            let mount = try TestMount(
                image.path, in: folder, options: files.flatMap { ["--passphrase-file", $0] })
            let file = try mount.open()
            #expect(try holds(file, 0..<64.KiB, 0xB1) && holds(file, 64.KiB..<128.KiB, 0xB2))
            // Copied up from one encryption into the other.
            try file.write([1], at: 200_000)
            #expect(try holds(file, 196_608..<200_000, 0xB1))
        }
        let model = try top.disk(in: folder)
        #expect(model[199_999..<200_002].elementsEqual([0xB1, 1, 0xB1]))
        try expectMountRefused(
            image.path, in: folder, options: ["--passphrase-file", passphraseFile],
            naming: ["base.qcow2", "passphrase is wrong"])
    }

    @Test("A directory of images tells sizes without a passphrase, and opens with one")
    func directory() throws {
        try makeImage()
        let mountpoint = try folder.directory("all")
        let images = try folder.directory("images")
        try Command.require("mv", image.path, images)
        let mount = try TestMount(
            [images], on: mountpoint, options: ["-r", "--passphrase-file", passphraseFile])
        let file = try TestFile(mountpoint + "/disk.raw", O_RDONLY)
        #expect(try file.byteCount() == 8.MiB && holds(file, 0..<128.KiB, 0xA1))
        _ = mount
    }

    @Test("info says what qemu-img says, without a passphrase")
    func info() throws {
        for encryption in [[], ["cipher-mode=cbc", "ivgen-alg=essiv", "ivgen-hash-alg=sha256"]] {
            try image.create(size: 8.MiB, encryption: encryption)
            let theirs = try Command.require("qemu-img", "info", "--output=json", image.path)
            let ours = try qcowfs("info", "--output", "json", image.path)
            #expect(ours.status == 0 && ours.errors.isEmpty, "\(ours)")
            #expect(try object(ours.output) == object(theirs))
            let text = try Command.require("qemu-img", "info", image.path)
            #expect(try qcowfs("info", image.path).output == text)
        }
        let check = try qcowfs("check", image.path)
        #expect(check.status == 0, "\(check)")
    }

    private func object(_ json: String) throws -> NSDictionary {
        let object = try JSONSerialization.jsonObject(with: Data(json.utf8))
        return try #require(object as? NSDictionary)
    }

    @Test("create encrypts as qemu-img does, and the image opens there")
    func create() throws {
        let result = try qcowfs(
            "create", "-o",
            "encrypt.format=luks,encrypt.cipher-alg=serpent-256,encrypt.cipher-mode=cbc,"
                + "encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,"
                + "encrypt.hash-alg=ripemd160,encrypt.iter-time=20,cluster_size=4k",
            "--passphrase-file", passphraseFile, image.path, "8M")
        #expect(result.status == 0 && result.output.isEmpty && result.errors.isEmpty, "\(result)")
        try image.io(["write -q -P 0x31 1M 64k", "read -q -P 0 0 1M", "read -q -P 0x31 1M 64k"])
        let info = try qcowfs("info", image.path).output
        for words in [
            "encrypted: yes", "cipher alg: serpent-256", "cipher mode: cbc", "ivgen alg: essiv",
            "ivgen hash alg: sha256", "hash alg: ripemd160",
        ] {
            #expect(info.contains(words), "\(words) in \(info)")
        }
        let mount = try TestMount(
            image.path, in: folder, options: ["--passphrase-file", passphraseFile])
        #expect(try holds(mount.open(O_RDONLY), 1.MiB..<1.MiB + 65536, 0x31))
    }

    @Test(
        "create refuses what cannot be encrypted so, and leaves no file",
        arguments: [
            (["encrypt.format=aes"], "luks"), (["encryption=on"], "encrypt.format=luks"),
            (["encrypt.cipher-alg=aes-256"], "encrypt.format=luks"),
            (["encrypt.format=luks", "encrypt.cipher-alg=rot13"], "aes-256"),
            (["encrypt.format=luks", "encrypt.cipher-alg=cast5-128"], "cast5"),
            (
                [
                    "encrypt.format=luks", "encrypt.ivgen-alg=essiv",
                    "encrypt.ivgen-hash-alg=sha1",
                ], "essiv"
            ),
            (["encrypt.format=luks", "encrypt.key-secret=s"], "--passphrase-file"),
            (["encrypt.format=luks", "encrypt.iter-time=0"], "iter-time"),
            (["encrypt.format=luks", "encrypt.colour=red"], "encrypt.colour"),
        ])
    func createRefuses(words: [String], naming: String) throws {
        expectRefusal(
            try qcowfs(
                "create", "-o", words.joined(separator: ","), "--passphrase-file",
                passphraseFile, image.path, "1M"), naming: naming)
        #expect(access(image.path, F_OK) != 0)
    }

    @Test("create without a passphrase names --passphrase-file; an empty one is refused")
    func createWithout() throws {
        expectRefusal(
            try qcowfs("create", "-o", "encrypt.format=luks", image.path, "1M"),
            naming: "--passphrase-file")
        let empty = try folder.write(Array("\n".utf8), to: "empty")
        expectRefusal(
            try qcowfs(
                "create", "-o", "encrypt.format=luks", "--passphrase-file", empty, image.path,
                "1M"), naming: "empty")
        #expect(access(image.path, F_OK) != 0)
    }

    @Test("At a terminal the passphrase is asked for, and nothing that is typed is shown")
    func terminal() throws {
        try makeImage()
        let mountpoint = try folder.directory("mnt")
        defer { _ = try? qcowfs("umount", mountpoint) }
        // A terminal for the program; the sleep lets it ask before the answer is typed.
        let script = """
            import os, pty, sys, time
            pid, terminal = pty.fork()
            if pid == 0: os.execv(sys.argv[1], ["qcowfs", "mount", sys.argv[2], sys.argv[3]])
            shown = b""
            while b": " not in shown: shown += os.read(terminal, 1000)
            os.write(terminal, b"opan" + b"\\x7f\\x7f" + b"en sesame\\r")
            while True:
                try: part = os.read(terminal, 1000)
                except OSError: break
                if not part: break
                shown += part
            sys.stdout.write(shown.decode())
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            """
        let result = try Command.run(
            ["python3", "-c", script, TestEnvironment.program, image.path, mountpoint])
        #expect(result.status == 0, "\(result)")
        #expect(result.output.contains("Passphrase for "), "\(result)")
        #expect(!result.output.contains("sesame"), "\(result)")
        let disk = mountpoint + "/disk.raw"
        #expect(try holds(TestFile(disk, O_RDONLY), 0..<128.KiB, 0xA1))
    }

    @Test("The daemon's memory holds neither passphrase nor key after the mount")
    func wiped() throws {
        guard geteuid() == 0 else { return }
        try makeImage()
        let mount = try TestMount(
            image.path, in: folder, options: ["--passphrase-file", passphraseFile])
        let pid = try mount.daemon()
        #expect(try !memory(of: pid, holds: Array("open sesame".utf8)))
        // The search itself works: the image's name is somewhere.
        #expect(try memory(of: pid, holds: Array("disk.qcow2".utf8)))
    }

    private func memory(of pid: pid_t, holds secret: [UInt8]) throws -> Bool {
        let maps = try String(contentsOfFile: "/proc/\(pid)/maps", encoding: .utf8)
        let file = try TestFile("/proc/\(pid)/mem", O_RDONLY)
        for line in maps.split(separator: "\n") {
            let words = line.split(separator: " ")
            guard words.count > 1, words[1].hasPrefix("rw") else { continue }
            let bounds = words[0].split(separator: "-").compactMap { Int($0, radix: 16) }
            guard bounds.count == 2, bounds[1] - bounds[0] < 256 << 20 else { continue }
            guard let bytes = try? file.read(bounds[0]..<bounds[1]) else { continue }
            if Data(bytes).range(of: Data(secret)) != nil { return true }
        }
        return false
    }
}
