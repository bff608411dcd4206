import Foundation
import QCOW2
import TestSupport
import Testing

/// Findings of the check, on images built byte by byte and against qemu-img's.
@Suite("Checking images")
struct CheckTests {
    static let cluster = 65536

    /// An image with two data clusters; header, L1, L2, data at 0x10000 × 1, 2, 3, 4.
    private func image(_ change: (inout [UInt8], ImageBuilder) -> Void = { _, _ in }) -> [UInt8] {
        var builder = ImageBuilder(byteCount: 1.MiB)
        _ = builder.fill(0x11, guestCluster: 0)
        _ = builder.fill(0x22, guestCluster: 1)
        var bytes = builder.build()
        change(&bytes, builder)
        return bytes
    }

    private func device(_ bytes: [UInt8]) throws -> RAMDisk {
        let device = RAMDisk()
        try bytes.withUnsafeBytes { try device.write($0, at: 0) }
        return device
    }

    private func findings(_ bytes: [UInt8]) throws -> (check: ImageCheck, findings: [CheckFinding])
    {
        let list = Findings()
        let check = try ImageCheck(try device(bytes)) { list.all.append($0) }
        return (check, list.all)
    }

    private func entryOffset(_ bytes: [UInt8], _ cluster: Int) -> Int {
        // The L1 table has one entry, and the L2 table lies where it says.
        bytes.withUnsafeBytes { raw in
            let l1 = Int(raw.bigEndian(at: 40, as: UInt64.self) ?? 0)
            let l2 = Int(L1Entry(bits: raw.bigEndian(at: l1, as: UInt64.self) ?? 0).offset)
            return l2 + cluster * 8
        }
    }

    private func entry(_ bytes: [UInt8], _ cluster: Int) -> UInt64 {
        bytes.withUnsafeBytes { $0.bigEndian(at: entryOffset(bytes, cluster)) ?? 0 }
    }

    private func setEntry(_ bytes: inout [UInt8], _ cluster: Int, _ value: UInt64) {
        bytes.storeBigEndian(value, at: entryOffset(bytes, cluster))
    }

    @Test("A sound image has no findings, and its figures")
    func clean() throws {
        let (check, findings) = try findings(image())
        #expect(findings.isEmpty)
        #expect(check.totalClusterCount == 16 && check.allocatedClusterCount == 2)
        #expect(check.fragmentedClusterCount == 0 && check.compressedClusterCount == 0)
    }

    @Test("A dropped reference is a leak")
    func leak() throws {
        var bytes = image()
        let lost = entry(bytes, 1) & 0x00ff_ffff_ffff_fe00
        setEntry(&bytes, 1, 0)
        let (check, findings) = try findings(bytes)
        #expect(findings == [.leak(cluster: lost / 65536, stored: 1, found: 0)])
        #expect(check.leakCount == 1 && check.corruptionCount == 0)
    }

    @Test("Two references to a cluster that counts one are a corruption")
    func shared() throws {
        var bytes = image()
        setEntry(&bytes, 2, entry(bytes, 1))
        let (check, findings) = try findings(bytes)
        let shared = (entry(bytes, 1) & 0x00ff_ffff_ffff_fe00) / 65536
        #expect(findings == [.countTooLow(cluster: shared, stored: 1, found: 2)])
        #expect(check.corruptionCount == 1)
    }

    @Test("A missing COPIED flag is a corruption")
    func copied() throws {
        var bytes = image()
        setEntry(&bytes, 0, entry(bytes, 0) & ~(1 << 63))
        let (_, findings) = try findings(bytes)
        #expect(findings == [.clusterCopied(entry: entry(bytes, 0), stored: 1)])
    }

    @Test("Reserved bits of an L2 entry are a corruption", arguments: Array(1...8) + Array(56...61))
    func reserved(bit: Int) throws {
        var bytes = image()
        setEntry(&bytes, 0, entry(bytes, 0) | 1 << UInt64(bit))
        #expect(try findings(bytes).findings.contains(.l2EntryReserved(entry: entry(bytes, 0))))
    }

    @Test("A reference past the end of the file is a corruption, and costs no memory")
    func pastTheEnd() throws {
        var bytes = image()
        setEntry(&bytes, 5, 1 << 63 | 1 << 55)
        let (_, findings) = try findings(bytes)
        #expect(findings.contains(.pastTheEnd(offset: 1 << 55, byteCount: 65536)))
    }

    @Test("Messages are one line each")
    func lines() throws {
        var bytes = image()
        for cluster in 2..<16 {
            setEntry(&bytes, cluster, 0x5a5a_5a5a_5a5a_5a5a &* UInt64(cluster))
        }
        for finding in try findings(bytes).findings {
            #expect(!finding.description.isEmpty && !finding.description.contains("\n"))
        }
    }

    @Test("Counts of every size are kept")
    func counts() {
        var counts = ReferenceCounts()
        let added = (0..<70000).filter { _ in counts.add(5, maximum: .max) }
        #expect(added.count == 70000 && counts.count(of: 5) == 70000)
        let first = counts.add(1 << 50, maximum: 1)
        let second = counts.add(1 << 50, maximum: 1)
        #expect(first && !second)
        #expect(counts.count(of: 1 << 50) == 1 && counts.highestCluster == 1 << 50)
        #expect(counts.count(of: 6) == 0)
    }

    private struct Verdict: Decodable, Equatable {
        var corruptions: UInt64?
        var leaks: UInt64?
        var total: UInt64?
        var allocated: UInt64?
        var fragmented: UInt64?
        var compressed: UInt64?
        var end: UInt64?

        enum CodingKeys: String, CodingKey {
            case corruptions, leaks
            case total = "total-clusters"
            case allocated = "allocated-clusters"
            case fragmented = "fragmented-clusters"
            case compressed = "compressed-clusters"
            case end = "image-end-offset"
        }
    }

    private func verdict(_ check: ImageCheck) -> Verdict {
        func number(_ value: UInt64) -> UInt64? { value == 0 ? nil : value }
        return Verdict(
            corruptions: number(check.corruptionCount), leaks: number(check.leakCount),
            total: number(check.totalClusterCount), allocated: number(check.allocatedClusterCount),
            fragmented: number(check.fragmentedClusterCount),
            compressed: number(check.compressedClusterCount), end: number(check.imageEndOffset))
    }

    @Test(
        "Damaged images get qemu-img's verdict and counts", .needsQemuImg,
        arguments: [(512, 4), (4096, 0), (4096, 6), (65536, 3), (65536, 4)])
    func damaged(clusterByteCount: Int, refcountOrder: Int) throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        try QemuImg.create(
            path, size: 2.MiB,
            options: ["cluster_size=\(clusterByteCount)", "refcount_bits=\(1 << refcountOrder)"])
        // Compressed clusters first: QEMU writes none over clusters that have a place.
        let compressed = (0..<4).map { "write -q -c -P 9 \($0 * 7 * 65536) 65536" }
        let plain = (0..<9).map { _ in "write -q -P 7 \(random.next() % 500 * 4096) 8192" }
        try QemuImg.io(path, compressed + plain)
        if refcountOrder > 0 {
            try QemuImg.snapshot(path, create: "s")
            try QemuImg.io(path, ["write -q -P 8 64k 64k", "discard -q 1M 64k"])
        }
        let original = try TestFile(path, O_RDWR)
        let sound = try original.read(0..<(try original.byteCount()))
        for round in 0..<(TestEnvironment.isLong ? 4000 : 100) {
            var bytes = sound
            if round > 0 { damage(&bytes, clusterByteCount, &random) }
            try original.write(bytes, at: 0)
            let theirs = try Command.run(["qemu-img", "check", "--output=json", path])
            if theirs.status == 1 { continue }
            let expected = try JSONDecoder().decode(Verdict.self, from: Data(theirs.output.utf8))
            let found = try ImageCheck(path: path)
            #expect(verdict(found) == expected, "seed \(TestEnvironment.seed), round \(round)")
        }
    }

    /// How a check ends.
    private enum Ending: Equatable {
        case verdict(Verdict)
        case refused(String)
    }

    private func ending(ofQEMU path: String) throws -> Ending? {
        let run = try Command.run(["timeout", "10", "qemu-img", "check", "--output=json", path])
        if run.status == 1 { return .refused(run.errors) }
        // It may take forever, or crash.
        guard [0, 2, 3].contains(run.status) else { return nil }
        return .verdict(try JSONDecoder().decode(Verdict.self, from: Data(run.output.utf8)))
    }

    private func ending(ofOurs path: String) -> Ending {
        do { return .verdict(verdict(try ImageCheck(path: path))) } catch {
            return .refused("\(error)")
        }
    }

    /// Why the two may end differently.
    ///
    /// - QEMU ends where it refuses to open an image; a check of ours may say what is wrong inside.
    /// - Some headers are refused here that QEMU goes on with: what cannot be opened has no
    ///   verdict.
    /// - A snapshot table behind the end of the file reads as zeros in QEMU; here the check ends,
    ///   since repairing would free what the snapshots have.
    private func isExplained(_ ours: Ending, _ theirs: Ending, _ bytes: [UInt8]) -> Bool {
        switch (ours, theirs) {
        case (.refused, .refused): true
        case (.verdict(let ours), .refused): ours.corruptions != nil
        case (.refused(let reason), .verdict(let theirs)):
            !opens(bytes) || theirs.corruptions != nil && reason.contains("snapshot table")
        case (.verdict(let ours), .verdict(let theirs)): ours == theirs
        }
    }

    private func opens(_ bytes: [UInt8]) -> Bool {
        let image = try? Image.open(RecordingDevice(bytes, yielding: false), options: .readOnly)
        try? image?.close()
        return image != nil
    }

    @Test("Hostile images get qemu-img's verdict and counts, or an explained one", .needsQemuImg)
    func hostile() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        var verdictCount = 0
        for round in 0..<(TestEnvironment.isLong ? 40_000 : 1500) {
            let bytes = HostileImage.mutant(&random)
            try Data(bytes).write(to: URL(fileURLWithPath: path))
            guard let theirs = try ending(ofQEMU: path) else { continue }
            let ours = ending(ofOurs: path)
            #expect(
                isExplained(ours, theirs, bytes),
                "seed \(TestEnvironment.seed), round \(round): \(ours), QEMU: \(theirs)")
            if case .verdict = theirs { verdictCount += 1 }
        }
        print("• \(verdictCount) hostile images have a verdict of qemu-img's")
    }

    /// Changes some eight bytes somewhere in the tables, mostly.
    private func damage(
        _ bytes: inout [UInt8], _ clusterByteCount: Int, _ random: inout RepeatableRandom
    ) {
        let words = min(bytes.count, clusterByteCount * 12) / 8
        for _ in 0..<3 {
            let offset = max(104, Int(random.next() % UInt64(words)) * 8)
            switch random.next() % 4 {
            case 0: bytes.storeBigEndian(UInt64(0), at: offset)
            case 1: bytes[offset] ^= 0x80
            case 2: bytes[offset + Int(random.next() % 8)] ^= 1 << (random.next() % 8)
            default:
                let target = random.next() % UInt64(bytes.count / clusterByteCount + 2)
                let copied = random.next() << 63
                bytes.storeBigEndian(target * UInt64(clusterByteCount) | copied, at: offset)
            }
        }
    }
}

/// Collects what a check reports.
private final class Findings {
    var all: [CheckFinding] = []
}
