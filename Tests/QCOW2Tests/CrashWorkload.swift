import Glibc
import QCOW2
import Synchronization
import TestSupport

/// Threads that write, overwrite, discard, zero, read and flush an image on a recording device,
/// noting each step in the record.
struct CrashWorkload {
    struct WrongRead: Error, CustomStringConvertible { let description: String }

    let layout: CrashLayout
    let seed: UInt64
    var threadCount = 3
    var stepCount = 40

    /// Runs the steps, closes the image, and returns the record.
    ///
    /// `device`: what the engine sees of the recording device; `data`: what it sees of the external
    /// data file.
    func run(
        through device: (RecordingDevice) -> any BlockDevice = { $0 },
        data: (any BlockDevice) -> any BlockDevice = { $0 }
    ) throws -> (record: RecordingDevice, values: [UInt64]) {
        let (bytes, values) = layout.build()
        let record = RecordingDevice(bytes, seed: seed)
        let image = try layout.open(record, through: device, data: data)
        if let interval = layout.commitInterval {
            image.startCommitting(every: .milliseconds(interval))
        }
        let run = Run(layout: layout, image: image, record: record, values: values)
        let (seed, stepCount) = (seed, stepCount)
        do {
            try onThreads(threadCount) { index in
                var random = RepeatableRandom(seed: seed &* 31 &+ UInt64(index))
                for _ in 0..<stepCount { try run.step(&random) }
            }
        } catch {
            try? image.close()
            throw error
        }
        try image.close()
        return (record, values)
    }
}

private final class Run: Sendable {
    let layout: CrashLayout
    let image: Image
    let record: RecordingDevice
    let reservations = RangeReservations()
    let nextID = Atomic(1)
    /// What each sector holds for a reader now.
    let latest: Mutex<[UInt64]>

    init(layout: CrashLayout, image: Image, record: RecordingDevice, values: [UInt64]) {
        (self.layout, self.image, self.record) = (layout, image, record)
        latest = Mutex(values)
    }

    func step(_ random: inout RepeatableRandom) throws {
        switch random.number(below: 20) {
        case 0..<10: try change(sectors(&random)) { try self.write($0, value: $1) }
        case 10..<12 where layout.canDiscard:
            let range = layout.isExtended ? sectors(&random) : clusters(&random)
            try change(range, zeroing: true) { sectors, _ in
                try self.image.discard(self.bytes(sectors))
            }
        case 12..<14:
            try change(sectors(&random), zeroing: true) { sectors, _ in
                try self.image.writeZeroes(
                    self.bytes(sectors), keepingSpace: sectors.lowerBound % 2 == 0)
            }
        case 14..<16: try flush()
        // Changes nothing that can be read, so it may run beside whatever else is going on.
        case 16: try image.allocate(bytes(sectors(&random)))
        default: try read(sectors(&random))
        }
    }

    /// A few sectors, mostly less than a cluster, often near others, so that clusters are shared.
    private func sectors(_ random: inout RepeatableRandom) -> Range<Int> {
        let most = random.chance(oneIn: 4) ? layout.sectorsPerCluster * 2 + 1 : 6
        let count = min(1 + random.number(below: most), layout.sectorCount)
        let start = random.number(below: layout.sectorCount - count + 1)
        return start..<start + count
    }

    private func clusters(_ random: inout RepeatableRandom) -> Range<Int> {
        let count = 1 + random.number(below: 3)
        let start = random.number(below: layout.guestClusters - count + 1)
        return start * layout.sectorsPerCluster..<(start + count) * layout.sectorsPerCluster
    }

    private func bytes(_ sectors: Range<Int>) -> Range<UInt64> {
        UInt64(sectors.lowerBound * 512)..<UInt64(sectors.upperBound * 512)
    }

    private func change(
        _ sectors: Range<Int>, zeroing: Bool = false, _ body: (Range<Int>, UInt64) throws -> Void
    ) throws {
        let id = nextID.add(1, ordering: .relaxed).newValue
        let value: UInt64 = zeroing ? 0 : UInt64(id) + 1000
        _ = try reservations.with(sectors) {
            record.note(.issued(id: id, sectors: sectors, value: value))
            try body(sectors, value)
            latest.withLock { latest in for sector in sectors { latest[sector] = value } }
            record.note(.returned(id: id))
        }
    }

    private func write(_ sectors: Range<Int>, value: UInt64) throws {
        try SectorPattern.bytes(sectors: sectors, value: value).withUnsafeBytes {
            try image.write($0, at: UInt64(sectors.lowerBound * 512))
        }
    }

    private func flush() throws {
        let id = nextID.add(1, ordering: .relaxed).newValue
        record.note(.flushCalled(id: id))
        try image.flush()
        record.note(.flushReturned(id: id))
    }

    private func read(_ sectors: Range<Int>) throws {
        _ = try reservations.with(sectors) {
            var bytes = [UInt8](repeating: 0xFF, count: sectors.count * 512)
            try bytes.withUnsafeMutableBytes {
                try image.read(into: $0, at: UInt64(sectors.lowerBound * 512))
            }
            for sector in sectors {
                let start = (sector - sectors.lowerBound) * 512
                let found = bytes[start..<start + 512].withUnsafeBytes {
                    SectorPattern.value(of: $0, sector: sector)
                }
                let expected = latest.withLock { $0[sector] }
                guard found == expected else {
                    throw CrashWorkload.WrongRead(
                        description: "sector \(sector) reads \(found.map(String.init) ?? "garbage")"
                            + ", \(expected) was written last")
                }
            }
        }
    }
}
