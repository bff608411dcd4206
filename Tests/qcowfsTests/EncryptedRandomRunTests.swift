import TestSupport
import Testing

/// One kind of encrypted image of the random runs.
struct EncryptedCombination: RandomRunSubject, CustomTestStringConvertible {
    enum Content: String, CaseIterable, Sendable {
        case plain = "no backing"
        case overClear = "over a clear qcow2 file"
        case overRaw = "over a shorter raw file"
        case overEncrypted = "over an encrypted file"
        case clearOverEncrypted = "in clear over an encrypted file"
        case compressed = "with compressed clusters"
        case snapshots = "with snapshots"
        case dataFile = "with an external data file"
        case cbc = "twofish in CBC with ESSIV"
    }

    let clusterSize: Int
    let content: Content

    var testDescription: String { "LUKS, \(clusterSize) B, \(content.rawValue)" }

    static let every = [4096, 65536, 2 << 20].flatMap { clusterSize in
        Content.allCases.map { EncryptedCombination(clusterSize: clusterSize, content: $0) }
    }

    static let passphrase = "open sesame"
    static let passphraseBelow = "another"

    private var byteCount: Int {
        switch clusterSize {
        case 4096: 4.MiB + 1536
        case 65536: 12.MiB + 1536
        default: 24.MiB + 1536
        }
    }

    func prepare(in folder: TemporaryDirectory, seed: UInt64) throws -> Combination.Prepared {
        var random = RepeatableRandom(seed: seed)
        var image = EncryptedImage(folder.file("disk.qcow2"), passphrase: Self.passphrase)
        image.isEncrypted = content != .clearOverEncrypted
        var options = ["cluster_size=\(clusterSize)"]
        if content == .dataFile { options.append("data_file=\(folder.file("disk.data"))") }
        let encryption =
            content == .cbc
            ? [
                "cipher-alg=twofish-256", "cipher-mode=cbc", "ivgen-alg=essiv",
                "ivgen-hash-alg=sha256",
            ] : []
        let backing = try makeBacking(in: folder, &random)
        if content == .overEncrypted || content == .clearOverEncrypted {
            image.encryptedBelow = [("backing", Self.passphraseBelow, "luks")]
        }
        try image.create(
            size: byteCount, encryption: encryption, options: options, backing: backing?.name,
            backingFormat: backing?.format ?? "qcow2")
        var snapshots: [String: ReferenceDisk] = [:]
        if content == .snapshots {
            for name in ["first", "second"] {
                try image.io(writes(&random, in: byteCount))
                try image.snapshot(create: name)
                snapshots[name] = try image.disk(in: folder)
            }
        }
        if content == .compressed {
            try image.io(
                (0..<6).map { "write -q -c -P \($0 + 1) \($0 * clusterSize) \(clusterSize)" })
        }
        try image.io(writes(&random, in: byteCount))
        return Combination.Prepared(
            image: image.path, model: try image.disk(in: folder), snapshots: snapshots,
            encrypted: image)
    }

    private func makeBacking(
        in folder: TemporaryDirectory, _ random: inout RepeatableRandom
    ) throws -> (name: String, format: String)? {
        let size = byteCount * 5 / 8 / 512 * 512
        switch content {
        case .overRaw:
            let disk = ReferenceDisk(byteCount: size + 100)
            for _ in 0..<40 { disk.scribble(&random, upTo: clusterSize * 2) }
            try disk.save(to: folder.file("base.raw"))
            return ("base.raw", "raw")
        case .overClear, .overEncrypted, .clearOverEncrypted:
            var base = EncryptedImage(
                folder.file("base.qcow2"), passphrase: Self.passphraseBelow)
            base.isEncrypted = content != .overClear
            try base.create(size: size)
            try base.io(writes(&random, in: size))
            return ("base.qcow2", "qcow2")
        default: return nil
        }
    }

    private func writes(_ random: inout RepeatableRandom, in size: Int) -> [String] {
        (0..<8).map { _ in
            let most = max(8, min(clusterSize * 3, size / 4) / 512)
            let count = (1 + random.number(below: most)) * 512
            let offset = random.number(below: (size - count) / 512 + 1) * 512
            return "write -q -P \(1 + random.number(below: 255)) \(offset) \(count)"
        }
    }
}

extension RandomRun {
    /// QEMU, which has the passphrase, has the last word on an encrypted image.
    func judge(
        _ image: EncryptedImage, _ prepared: Combination.Prepared, in folder: TemporaryDirectory,
        dataRanges: [Range<Int>]
    ) throws {
        let check = try image.check()
        guard check.status == 0 else { throw Difference(description: "\(check)") }
        let raw = folder.file("model.raw")
        try prepared.model.save(to: raw)
        if let difference = try image.difference(from: raw) {
            throw Difference(description: difference)
        }
        if let difference = firstDifference(dataRanges, try image.dataRanges()) {
            throw Difference(
                description: "holes: lseek said \(difference.0 ?? 0..<0), qemu-img map "
                    + "\(difference.1 ?? 0..<0)")
        }
        for (name, kept) in prepared.snapshots {
            let disk = try image.disk(in: folder, snapshot: name)
            let all = UnsafeRawBufferPointer(disk.bytes)
            if let place = kept.firstDifference(in: 0..<kept.byteCount, from: all) {
                throw Difference(description: "snapshot \(name) changed at \(place)")
            }
        }
    }
}

/// Encrypted images through a real mount, beside a model.
@Suite("Random run, encrypted", .serialized, .enabledWhereMountable)
struct EncryptedRandomRunTests {
    let folder: TemporaryDirectory
    let mountOptions: [String]

    init() throws {
        folder = try TemporaryDirectory()
        var options: [String] = []
        for words in [EncryptedCombination.passphrase, EncryptedCombination.passphraseBelow] {
            options += ["--passphrase-file", try folder.write(Array(words.utf8), to: words)]
        }
        mountOptions = options
    }

    @Test(
        "An encrypted disk used by several threads equals its model",
        arguments: EncryptedCombination.every)
    func equalsModel(_ combination: EncryptedCombination) throws {
        let seed = TestEnvironment.seed + 37
        do {
            var run = RandomRun(combination: combination, seed: seed)
            run.mountOptions = mountOptions
            try run.run()
        } catch {
            Issue.record("\(combination.testDescription), seed \(seed): \(error)")
        }
    }

    @Test(
        "So does one mounted past the page cache, or with writes kept back",
        arguments: [["--direct"], ["--writeback", "on"]])
    func equalsModelWithOptions(options: [String]) throws {
        let combination = EncryptedCombination(clusterSize: 65536, content: .overEncrypted)
        do {
            var run = RandomRun(combination: combination, seed: TestEnvironment.seed + 38)
            run.mountOptions = mountOptions + options
            try run.run()
        } catch {
            Issue.record("\(options), \(combination.testDescription): \(error)")
        }
    }

    @Test("The judge of these runs notices one changed byte")
    func judgeNotices() throws {
        var run = RandomRun(
            combination: EncryptedCombination(clusterSize: 4096, content: .dataFile),
            seed: TestEnvironment.seed)
        run.mountOptions = mountOptions
        run.roundCount = 1
        run.tamper = { image in
            let file = try TestFile(image.replacing("disk.qcow2", with: "disk.data"), .init(2))
            // In a data file every byte has the place that it has on the disk.
            let ranges = try EncryptedImage(
                image, passphrase: EncryptedCombination.passphrase
            ).dataRanges()
            let start = try #require(ranges.first?.lowerBound)
            let byte = try file.read(start..<start + 1)
            try file.write([byte[0] ^ 0xFF], at: start)
        }
        #expect(throws: RandomRun.Difference.self) { try run.run() }
    }
}
