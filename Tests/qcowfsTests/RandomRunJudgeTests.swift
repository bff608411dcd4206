import Glibc
import TestSupport
import Testing

/// The judge of the random runs: one changed byte, anywhere, and it says so.
@Suite("Random run's judge", .serialized, .enabledWhereMountable)
struct RandomRunJudgeTests {
    private func expectNotice(
        _ combination: Combination, of tamper: @escaping (String) throws -> Void
    ) throws {
        let run = try RandomRun(combination, seed: TestEnvironment.seed)
        run.roundCount = 1
        run.tamper = tamper
        #expect(throws: RandomRun.Difference.self) { try run.run() }
    }

    private func flipByte(at offset: Int, of path: String) throws {
        let file = try TestFile(path, O_RDWR)
        let byte = try file.read(offset..<offset + 1)
        try file.write([byte[0] ^ 0xFF], at: offset)
    }

    /// A host cluster that holds guest data, found by the tests' own reader.
    private func dataCluster(
        of image: String, in snapshot: String? = nil
    ) throws -> Int {
        let reader = try ReferenceImage(image).qcow2
        let table = try reader.snapshots().entries.first { $0.name == snapshot }?.table
        for cluster in 0..<reader.byteCount / reader.clusterSize {
            let raw = try reader.rawEntry(forGuestCluster: cluster, in: table ?? reader.active)
            let active = try reader.rawEntry(forGuestCluster: cluster, in: reader.active)
            if case .normal(let host) = try reader.entry(raw), table == nil || active != raw {
                return host
            }
        }
        throw RandomRun.Difference(description: "no data to tamper with")
    }

    @Test("It notices a byte of the disk", arguments: [false, true])
    func disk(hasSnapshots: Bool) throws {
        let combination = Combination(clusterSize: 4096, hasSnapshots: hasSnapshots)
        try expectNotice(combination) { try flipByte(at: dataCluster(of: $0), of: $0) }
    }

    @Test("It notices a byte of a snapshot that the disk does not have")
    func snapshot() throws {
        try expectNotice(Combination(clusterSize: 4096, hasSnapshots: true)) {
            try flipByte(at: dataCluster(of: $0, in: "first"), of: $0)
        }
    }

    @Test("It notices a byte of an encrypted data file")
    func dataFile() throws {
        let combination = Combination(clusterSize: 4096, dataFile: .plain, encryption: .aes)
        try expectNotice(combination) { path in
            // In a data file every byte has the place that it has on the disk.
            let image = EncryptedImage(path, passphrase: Combination.passphrase)
            let start = try #require(image.dataRanges().first?.lowerBound)
            try flipByte(at: start, of: path.replacing("disk.qcow2", with: "disk.data"))
        }
    }

    @Test("It notices a write that no bitmap knows of, and one that is not there")
    func bitmap() throws {
        let combination = Combination(clusterSize: 4096, hasBitmaps: true)
        try expectNotice(combination) {
            try Command.require("qemu-img", "bitmap", "--clear", $0, "coarse")
        }
        try expectNotice(combination) {
            try Command.require("qemu-img", "bitmap", "--enable", $0, "off")
        }
        try expectNotice(combination) {
            try Command.require("qemu-img", "bitmap", "--merge", "coarse", $0, "fine")
        }
    }
}
