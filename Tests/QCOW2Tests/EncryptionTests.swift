import QCOW2
import TestSupport
import Testing

/// Encrypted images that QEMU made, and ones that we make, each read and written by both.
@Suite("Encryption", .serialized, .needsQemuImg)
struct EncryptionTests {
    let folder: TemporaryDirectory
    let image: EncryptedImage

    init() throws {
        folder = try TemporaryDirectory()
        image = EncryptedImage(folder.file("disk.qcow2"))
    }

    private func open(
        access: OpenOptions.Access = .readWrite, _ passphrase: String = "open sesame"
    ) throws -> Image {
        try Image.open(image.path, options: OpenOptions(access: access, passphrases: passphrase))
    }

    /// Writes with QEMU, reads and writes with us, and lets QEMU read all of it.
    private func exchange() throws {
        try image.io(["write -q -P 0xA1 0 100k", "write -q -P 0xA2 700k 3k"])
        let model = try image.disk(in: folder)
        let disk = try open()
        let byteCount = model.byteCount
        #expect(try disk.bytes(0..<byteCount) == Array(model[0..<byteCount]))
        // In place, over a part of a sector, into new clusters, and zeros.
        for (offset, count, byte) in [
            (4096, 8192, 0xB1), (5000, 100, 0xB2), (50_000, 70_001, 0xB3), (300_001, 511, 0xB4),
            (716_000, 65536, 0xB5),
        ] {
            let bytes = [UInt8](repeating: UInt8(byte), count: count)
            try disk.write(bytes, at: offset)
            bytes.withUnsafeBytes { model.write($0, at: offset) }
        }
        try disk.writeZeroes(30_000..<40_000)
        model.zero(30_000..<40_000)
        #expect(try disk.bytes(0..<byteCount) == Array(model[0..<byteCount]))
        try disk.close()
        let raw = folder.file("model.raw")
        try model.save(to: raw)
        #expect(try image.difference(from: raw) == nil)
        let check = try image.check()
        #expect(check.status == 0, "\(check)")
    }

    @Test(
        "What QEMU encrypts we read and write: each cipher, mode, vector and hash",
        arguments: TestEnvironment.isLong ? EncryptionSuite.allowed : EncryptionSuite.sample)
    func madeByQemu(_ suite: EncryptionSuite) throws {
        try image.create(size: 1.MiB, encryption: suite.words, options: ["cluster_size=4096"])
        try exchange()
    }

    @Test(
        "What we encrypt QEMU reads and writes: each cipher in each mode",
        arguments: TestEnvironment.isLong ? EncryptionSuite.allowed : EncryptionSuite.pairs)
    func madeByUs(_ suite: EncryptionSuite) throws {
        try create {
            $0.suite = suite.suite
            $0.hash = suite.hash
        }
        try exchange()
    }

    private func create(
        size: UInt64 = 1 << 20, _ change: (inout LUKSOptions) -> Void = { _ in },
        _ changeImage: (inout CreateOptions) -> Void = { $0.clusterByteCount = 4096 }
    ) throws {
        var luks = LUKSOptions(passphrase: Passphrase(image.passphrase))
        luks.milliseconds = 1
        change(&luks)
        var options = CreateOptions()
        options.encryption = luks
        changeImage(&options)
        try Image.create(at: image.path, size: size, options: options)
    }

    @Test("What we leave out, QEMU refuses too")
    func exclusions() throws {
        for suite in EncryptionSuite.every where suite.suite.contradiction != nil {
            // One of each reason will do: QEMU takes a second to say no.
            guard suite.hash == .sha256 || TestEnvironment.isLong else { continue }
            let result = try Command.run(
                image.creation(size: 1.MiB, encryption: suite.words))
            #expect(result.status != 0, "\(suite.testDescription)")
        }
    }

    @Test("A new image has the fields that QEMU gives one")
    func fields() throws {
        try create { $0.milliseconds = 50 }
        let check = try image.check()
        #expect(check.status == 0, "\(check)")
        let info = try ImageInfo(path: image.path)
        #expect(info.header?.encryptionMethod == 2)
        let luks = try #require(info.luks)
        #expect(luks.suite == CipherSuite() && luks.hash == .sha256)
        #expect(luks.payloadOffset == 4040)
        #expect(luks.keySlots.map(\.keyMaterialOffset) == (0..<8).map { 8 + 504 * $0 })
        #expect(luks.keySlots.map(\.isActive) == [true] + [Bool](repeating: false, count: 7))
        #expect(luks.keySlots[0].iterations >= 1000)
        #expect(luks.uuid.utf8.count == 36)
    }

    // MARK: Passphrases

    @Test("A wrong passphrase, none, and one for another program's slot")
    func wrongPassphrase() throws {
        try image.create(size: 1.MiB)
        #expect(throws: ImageError(.encryption(.wrongPassphrase), file: image.path)) {
            try open("open sesam")
        }
        #expect(throws: ImageError(.encryption(.passphraseNeeded), file: image.path)) {
            try Image.open(image.path)
        }
        #expect(throws: ImageError(.encryption(.wrongPassphrase), file: image.path)) {
            try open("")
        }
    }

    @Test("Every key slot opens the image, until it is closed")
    func keySlots() throws {
        try image.create(size: 1.MiB)
        try image.io(["write -q -P 0x77 0 64k"])
        for number in 1...3 { try image.add(passphrase: "key \(number)") }
        for passphrase in [image.passphrase, "key 1", "key 2", "key 3"] {
            let disk = try open(passphrase)
            #expect(try disk.bytes(65000..<65010) == [UInt8](repeating: 0x77, count: 10))
            try disk.close()
        }
        try image.remove(passphrase: "key 2")
        #expect(throws: ImageError.self) { try open("key 2") }
        try open("key 3").close()
    }

    @Test("A passphrase file's newline may be part of the passphrase, or not")
    func passphraseFiles() throws {
        try image.create(size: 1.MiB)
        for content in ["open sesame", "open sesame\n"] {
            let file = try folder.write(Array(content.utf8), to: "passphrase")
            let source = PassphraseSource([try Passphrase.read(fromFile: file)])
            try Image.open(image.path, options: OpenOptions(passphrases: source)).close()
        }
        // 5000 bytes do not fit in the first buffer.
        let long = String(repeating: "long ", count: 1000) + "\n"
        let file = try folder.write(Array(long.utf8), to: "passphrase")
        try Command.require([
            "qemu-img", "create", "-q", "-f", "qcow2",
            "--object", "secret,id=s,file=\(file)", "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", image.path, "1M",
        ])
        let source = PassphraseSource([try Passphrase.read(fromFile: file)])
        try Image.open(image.path, options: OpenOptions(passphrases: source)).close()
    }

    @Test("Of several passphrases each is tried, and a question is asked where there are none")
    func questions() throws {
        try image.create(size: 1.MiB)
        try Image.open(
            image.path,
            options: OpenOptions(passphrases: "first", "second", image.passphrase)
        ).close()
        let passphrase = image.passphrase
        let source = PassphraseSource { file in
            file.hasSuffix("disk.qcow2") ? Passphrase(passphrase) : nil
        }
        try Image.open(image.path, options: OpenOptions(passphrases: source)).close()
    }

    @Test("Opened without its passphrase, an image tells its metadata and no data")
    func locked() throws {
        try image.create(size: 1.MiB)
        try image.io(["write -q -P 0x77 64k 64k"])
        let disk = try Image.open(
            image.path, options: OpenOptions(access: .readOnly, passphrases: .locked))
        #expect(disk.size == 1 << 20)
        #expect(try disk.seekData(from: 0) == 65536)
        #expect(try disk.bytes(0..<512) == [UInt8](repeating: 0, count: 512))
        #expect(throws: ImageError(.encryption(.locked), file: image.path)) {
            try disk.bytes(65536..<66048)
        }
        try disk.close()
    }

    @Test("Metadata is checked without a passphrase, and the LUKS header is in use")
    func check() throws {
        try image.create(size: 1.MiB)
        try image.io(["write -q -P 0x77 64k 64k"])
        let found = try ImageCheck(path: image.path)
        #expect(found.corruptionCount == 0 && found.leakCount == 0)
        #expect(found.allocatedClusterCount == 1)
    }

    // MARK: Legacy AES

    @Test("Trap 37: legacy AES has keys of 128 bits and counts guest sectors; it is only read")
    func legacyAES() throws {
        var legacy = image
        legacy.format = "aes"
        legacy.passphrase = "short"
        try legacy.create(size: 1.MiB, options: ["cluster_size=4096"])
        // Host order differs from guest order.
        try legacy.io(["write -q -P 3 900k 8k", "write -q -P 4 0 64k", "write -q -P 5 300k 512"])
        let model = try legacy.disk(in: folder)
        let disk = try open(access: .readOnly, "short")
        #expect(try disk.bytes(0..<(1.MiB)) == Array(model[0..<(1.MiB)]))
        #expect(try disk.bytes(921_700..<923_333) == Array(model[921_700..<923_333]))
        try disk.close()
        // A longer passphrase is cut at 16 bytes; a wrong one gives other bytes, not an error.
        let wrong = try open(access: .readOnly, "shorter")
        #expect(try wrong.bytes(0..<512) != Array(model[0..<512]))
        try wrong.close()
        #expect(throws: ImageError(.encryption(.writingLegacyAES), file: image.path)) {
            try open("short")
        }
    }

    // MARK: Clusters of every kind

    @Test(
        "Trap 37: LUKS counts host sectors, and compressed clusters are clear text",
        arguments: [512, 65536, 2 << 20])
    func hostSectors(clusterSize: Int) throws {
        let clusters = [5, 1, 3].map { $0 * clusterSize }
        try image.create(
            size: clusterSize * 8, options: ["cluster_size=\(clusterSize)"])
        try image.io(
            clusters.map { "write -q -P \($0 / clusterSize) \($0) \(clusterSize)" }
                + ["write -q -c -P 0x66 0 \(clusterSize)"])
        let model = try image.disk(in: folder)
        #expect(model[0..<1][0] == 0x66)
        let disk = try open()
        for start in stride(from: 0, to: model.byteCount, by: clusterSize) {
            let range = start..<start + clusterSize
            #expect(try disk.bytes(range) == Array(model[range]), "\(range)")
        }
        // Copied on write, a compressed cluster becomes an encrypted one.
        try disk.write([1, 2, 3], at: 100)
        try disk.close()
        [UInt8]([1, 2, 3]).withUnsafeBytes { model.write($0, at: 100) }
        let raw = folder.file("model.raw")
        try model.save(to: raw)
        #expect(try image.difference(from: raw) == nil)
    }

    @Test("What is written in clear nowhere lies in the file")
    func nothingInClear() throws {
        try create()
        let disk = try open()
        let line = Array("the quick brown fox jumps over the lazy dog, ".utf8)
        let text = (0..<400).flatMap { _ in line }
        try disk.write(text, at: 3000)
        try disk.write(Array(text[..<100]), at: 100_001)
        try disk.close()
        let bytes = try TestFile(image.path, .init(0)).read(0..<(4 << 20))
        let found = (0..<bytes.count - 9).contains {
            Array(bytes[$0..<$0 + 9]) == Array(line[4..<13])
        }
        #expect(!found)
    }

    @Test("Zeros under encryption are not zeros in the file: preallocated clusters read as zeros")
    func preallocated() throws {
        for mode in [CreateOptions.Preallocation.metadata, .falloc, .full] {
            try create(size: 1 << 20, { _ in }) {
                $0.clusterByteCount = 65536
                $0.preallocation = mode
            }
            let disk = try open()
            #expect(try disk.bytes(0..<(1.MiB)).allSatisfy { $0 == 0 }, "\(mode)")
            try disk.write([7], at: 70_000)
            #expect(try disk.bytes(65536..<70_001) == [UInt8](repeating: 0, count: 4464) + [7])
            try disk.close()
            let model = try image.disk(in: folder)
            model[70_000..<70_001][0] = 0
            #expect(UnsafeRawBufferPointer(model.bytes).isZero)
        }
    }

    @Test("Growing over an old tail that is encrypted gives zeros")
    func growing() throws {
        try create(size: 70 << 10)
        let disk = try open()
        try disk.write([UInt8](repeating: 9, count: 70 << 10), at: 0)
        try disk.resize(to: 65 << 10, shrinking: true)
        try disk.resize(to: 1 << 20)
        #expect(try disk.bytes(65 << 10..<(1.MiB)).allSatisfy { $0 == 0 })
        #expect(try disk.bytes(0..<65 << 10).allSatisfy { $0 == 9 })
        try disk.close()
        let check = try image.check()
        #expect(check.status == 0, "\(check)")
    }

    // MARK: Threads

    @Test("Two writers to one sector lose nothing of each other")
    func sharedSector() throws {
        try create(size: 1 << 20)
        let disk = try open()
        try disk.write([UInt8](repeating: 0, count: 64.KiB), at: 0)
        // Each thread owns every fourth byte run of 100 bytes; sectors are shared by all.
        try onThreads(4) { thread in
            for round in 1...60 {
                for start in stride(from: thread * 100, to: 8000, by: 400) {
                    let bytes = [UInt8](repeating: UInt8(thread * 60 + round), count: 100)
                    try disk.write(bytes, at: start)
                    guard try disk.bytes(start..<start + 100) == bytes else {
                        throw Command.Failure(description: "a write at \(start) was lost")
                    }
                }
            }
        }
        try disk.close()
    }

    @Test("A reader sees a sector as it was or as it is, never half of it decrypted")
    func tornSectors() throws {
        try create(size: 1 << 20)
        let disk = try open()
        try disk.write([UInt8](repeating: 1, count: 64.KiB), at: 0)
        try onThreads(4) { thread in
            for round in 0..<300 {
                if thread < 2 {
                    let value = UInt8(1 + (round + thread) % 3)
                    try disk.write([UInt8](repeating: value, count: 16.KiB), at: 0)
                } else {
                    let bytes = try disk.bytes(0..<16.KiB)
                    for sector in stride(from: 0, to: bytes.count, by: 512) {
                        let values = Set(bytes[sector..<sector + 512])
                        guard values.count == 1, values.isSubset(of: [1, 2, 3]) else {
                            throw Command.Failure(description: "sector \(sector) is torn")
                        }
                    }
                }
            }
        }
        try disk.close()
    }
}
