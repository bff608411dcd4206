import QCOW2
import TestSupport
import Testing

/// A check that reads several tables at once says what one says that reads them one by one.
@Suite("Checking images with several threads")
struct CheckThreadsTests {
    /// The findings in their order, then the figures or what ended the check.
    private func outcome(_ device: any BlockDevice, threads: Int) -> [String] {
        let findings = Findings()
        do throws(ImageError) {
            let check = try ImageCheck(device, threadCount: threads) { findings.add($0) }
            return findings.words + ["\(check)"]
        } catch {
            return findings.words + ["\(error)"]
        }
    }

    private final class Findings {
        private(set) var words: [String] = []
        func add(_ finding: CheckFinding) { words.append(finding.description) }
    }

    /// An image with 128 L2 tables, each with a cluster that has no COPIED flag.
    private func manyTables() -> [UInt8] {
        let clusterBits = 9
        let spanned = 1 << (clusterBits - 3)
        var builder = ImageBuilder(
            byteCount: (128 * spanned) << clusterBits, clusterBits: clusterBits)
        for table in 0..<128 {
            let offset = builder.fill(UInt8(table), guestCluster: table * spanned)
            builder.setEntry(UInt64(offset), guestCluster: table * spanned)
        }
        return builder.build()
    }

    @Test("Findings come in the order of the tables, whoever reads them")
    func order() throws {
        let device = RecordingDevice(manyTables(), yielding: false)
        let alone = outcome(device, threads: 1)
        #expect(alone.count > 128)
        for threads in [2, 3, 8, 200] { #expect(outcome(device, threads: threads) == alone) }
    }

    @Test("Damaged images get the same verdict")
    func damaged() {
        let seed = TestEnvironment.seed
        var random = RepeatableRandom(seed: seed)
        for number in 0..<(TestEnvironment.isLong ? 20_000 : 500) {
            let device = RecordingDevice(HostileImage.mutant(&random), yielding: false)
            #expect(
                outcome(device, threads: 3) == outcome(device, threads: 1),
                "seed \(seed), image \(number)")
        }
    }

    @Test("A table that cannot be read ends the check with its offset, after those before it")
    func unreadable() throws {
        let bytes = manyTables()
        for offset in stride(from: 0, to: bytes.count, by: 512) {
            let device = DeviceWithBadSector(
                RecordingDevice(bytes, yielding: false), at: UInt64(offset))
            #expect(outcome(device, threads: 4) == outcome(device, threads: 1), "at \(offset)")
        }
    }
}

/// One sector of it answers EIO.
private final class DeviceWithBadSector: ForwardingDevice {
    let base: any BlockDevice
    private let sector: Range<UInt64>

    init(_ base: any BlockDevice, at offset: UInt64) {
        self.base = base
        sector = offset..<offset + 512
    }

    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        if sector.overlaps(offset..<offset + UInt64(buffer.count)) { throw .inputOutput }
        return try base.read(into: buffer, at: offset)
    }
}
