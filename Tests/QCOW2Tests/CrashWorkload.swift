import QCOW2
import Synchronization
import TestSupport

/// Threads that write, overwrite, discard, zero, read and flush an image on a recording device,
/// while one changes the image's structure; each notes its steps in the record.
struct CrashWorkload {
    struct WrongRead: Error, CustomStringConvertible { let description: String }

    let layout: CrashLayout
    let seed: UInt64
    var threadCount = 3
    var stepCount = 40
    /// Snapshots made, applied and deleted, sizes changed, and so on.
    var changeCount = 0
    /// Whether the device may fail: then so may steps, and clients go on.
    var meetsFaults = false

    /// Runs the steps on the layout's image, closes it, and returns the record.
    ///
    /// `device`: what the engine sees of the recording device; `data`: what it sees of the external
    /// data file.
    func run(
        through device: (RecordingDevice) -> any BlockDevice = { $0 },
        data: (any BlockDevice) -> any BlockDevice = { $0 }
    ) throws -> (record: RecordingDevice, model: CrashModel) {
        let (record, model) = try layout.record()
        let steps = CrashSteps(record)
        try takingTurns(seed: seed) {
            try use(try layout.open(record, through: device, data: data), steps)
        }
        return (record, model)
    }

    /// Runs the steps and closes the image.
    func use(_ image: Image, _ steps: CrashSteps) throws {
        if let interval = layout.commitInterval {
            image.startCommitting(every: .milliseconds(interval))
        }
        do {
            let clients = try CrashClients(layout, image, steps, meetsFaults: meetsFaults)
            let (seed, stepCount, changeCount) = (seed, stepCount, changeCount)
            try onThreads(threadCount + (changeCount > 0 ? 1 : 0)) { index in
                var random = RepeatableRandom(seed: seed &* 31 &+ UInt64(index))
                if index == threadCount {
                    let names = CrashNames(layout, image, seed: seed)
                    for _ in 0..<changeCount { try clients.change(&random, names) }
                } else {
                    for _ in 0..<stepCount { try clients.step(&random) }
                }
            }
        } catch {
            try? image.close()
            throw error
        }
        do { try steps.change(.close) { try image.close() } } catch {
            guard meetsFaults, error is ImageError else { throw error }
        }
    }
}

extension CrashLayout {
    /// A recording device with the layout's image, and what that may hold.
    func record() throws -> (RecordingDevice, CrashModel) {
        let (bytes, values) = build()
        let found = try bytes.withUnsafeBytes { try CrashFinding(in: $0, self) }
        guard found.disk == values.map(Optional.some) else {
            throw ReferenceReader.Fault("the reader sees another disk than the builder made")
        }
        return (RecordingDevice(bytes), try CrashModel(of: found))
    }
}

/// The steps of a record, numbered.
final class CrashSteps: Sendable {
    let record: RecordingDevice
    private let next = Atomic(1)

    init(_ record: RecordingDevice) { self.record = record }

    func number() -> Int { next.add(1, ordering: .relaxed).oldValue }

    /// Makes a change; false where it was refused.
    @discardableResult
    func change(_ change: CrashChange, _ body: () throws -> Void) throws -> Bool {
        let id = number()
        record.note(.began(id: id, change))
        do { try body() } catch let error as ImageError {
            guard case .invalidArgument = error.kind else { throw error }
            record.note(.refused(id: id))
            return false
        }
        record.note(.ended(id: id))
        return true
    }

    func flush(_ image: Image) throws {
        let id = number()
        record.note(.flushCalled(id: id))
        try image.flush()
        record.note(.flushReturned(id: id))
    }
}

/// What several clients of one image share.
final class CrashClients: Sendable {
    let layout: CrashLayout
    let image: Image
    let steps: CrashSteps
    private let reservations = RangeReservations()
    /// What each sector holds for a reader now.
    private let latest: Mutex<[UInt64]>
    /// Sectors that a step which failed may have changed or not.
    private let unknown = Mutex<Set<Int>>([])
    private let meetsFaults: Bool
    private let gate = Monitor(Gate())

    private struct Gate {
        var isClosed = false
        var insideCount = 0
    }

    /// - Throws: Where the engine does not read what the tests' own reader reads.
    init(
        _ layout: CrashLayout, _ image: Image, _ steps: CrashSteps, meetsFaults: Bool = false
    ) throws {
        (self.layout, self.image, self.steps) = (layout, image, steps)
        self.meetsFaults = meetsFaults
        let values = try Self.values(of: image)
        let found = try steps.record.withBytes { bytes in
            Result { () throws(ReferenceReader.Fault) in try CrashFinding(in: bytes, layout) }
        }.get()
        guard found.disk == values.map(Optional.some) else {
            throw CrashWorkload.WrongRead(description: "the engine reads another disk")
        }
        latest = Mutex(values)
    }

    private static func values(of image: Image) throws -> [UInt64] {
        let bytes = try image.bytes(0..<Int(image.size))
        return try bytes.withUnsafeBytes { bytes in
            try (0..<bytes.count / 512).map { sector in
                guard let value = CrashFinding.value(of: sector, in: bytes) else {
                    throw CrashWorkload.WrongRead(description: "sector \(sector) reads garbage")
                }
                return value
            }
        }
    }

    // MARK: Steps

    func step(_ random: inout RepeatableRandom) throws {
        _ = gate.waitFor { gate -> Bool? in
            if gate.isClosed { return nil }
            gate.insideCount += 1
            return true
        }
        defer {
            gate.withLock { $0.insideCount -= 1 }
            gate.announceChange()
        }
        do { try take(&random) } catch {
            guard meetsFaults, error is ImageError else { throw error }
        }
    }

    private func take(_ random: inout RepeatableRandom) throws {
        switch random.number(below: 22) {
        case 0..<10: try change(sectors(&random)) { try self.write($0, value: $1) }
        case 10..<12 where canDiscard:
            let range = layout.isExtended ? sectors(&random) : clusters(&random)
            try change(range, zeroing: true) { sectors, _ in
                try self.image.discard(self.bytes(sectors))
            }
        case 12..<14:
            try change(sectors(&random), zeroing: true) { sectors, _ in
                try self.image.writeZeroes(
                    self.bytes(sectors), keepingSpace: sectors.lowerBound % 2 == 0)
            }
        case 14..<16: try steps.flush(image)
        // Changes nothing that can be read, so it may run beside whatever else is going on.
        case 16: try image.allocate(bytes(sectors(&random)))
        case 17..<19 where layout.hasCompressed:
            let range = clusters(&random).prefix(layout.sectorsPerCluster)
            guard range.count == layout.sectorsPerCluster else { return }
            try change(range.startIndex..<range.endIndex) { try self.compress($0, value: $1) }
        default: try read(sectors(&random))
        }
    }

    /// A discard on version 2 over a backing file cannot hide it, so what it gives is not told.
    private var canDiscard: Bool { image.header.version == 3 || !layout.hasBacking }

    /// A few sectors, mostly less than a cluster, often near others, so that clusters are shared.
    private func sectors(_ random: inout RepeatableRandom) -> Range<Int> {
        let end = latest.withLock { $0.count }
        let most = random.chance(oneIn: 4) ? layout.sectorsPerCluster * 2 + 1 : 6
        let count = min(1 + random.number(below: most), end)
        let start = random.number(below: end - count + 1)
        return start..<start + count
    }

    private func clusters(_ random: inout RepeatableRandom) -> Range<Int> {
        let end = latest.withLock { $0.count }
        let first = random.number(below: end / layout.sectorsPerCluster + 1)
        let start = min(first * layout.sectorsPerCluster, end - 1)
        return start..<min(start + (1 + random.number(below: 3)) * layout.sectorsPerCluster, end)
    }

    private func bytes(_ sectors: Range<Int>) -> Range<UInt64> {
        UInt64(sectors.lowerBound * 512)..<UInt64(sectors.upperBound * 512)
    }

    private func change(
        _ sectors: Range<Int>, zeroing: Bool = false, _ body: (Range<Int>, UInt64) throws -> Void
    ) throws {
        _ = try reservations.with(sectors) {
            let id = steps.number()
            let value: UInt64 = zeroing ? 0 : UInt64(id) + 1000
            steps.record.note(.issued(id: id, sectors: sectors, value: value))
            do { try body(sectors, value) } catch {
                unknown.withLock { $0.formUnion(sectors) }
                throw error
            }
            unknown.withLock { $0.subtract(sectors) }
            latest.withLock { latest in for sector in sectors { latest[sector] = value } }
            steps.record.note(.returned(id: id))
        }
    }

    private func write(_ sectors: Range<Int>, value: UInt64) throws {
        try image.write(
            SectorPattern.bytes(sectors: sectors, value: value), at: sectors.lowerBound * 512)
    }

    private func compress(_ sectors: Range<Int>, value: UInt64) throws {
        let stream = Streams.deflate(SectorPattern.bytes(sectors: sectors, value: value))
        try stream.withUnsafeBytes {
            try image.writeStream($0, at: UInt64(sectors.lowerBound * 512))
        }
    }

    private func read(_ sectors: Range<Int>) throws {
        _ = try reservations.with(sectors) {
            let bytes = try image.bytes(sectors.lowerBound * 512..<sectors.upperBound * 512)
            for sector in sectors {
                let start = (sector - sectors.lowerBound) * 512
                let found = bytes[start..<start + 512].withUnsafeBytes {
                    SectorPattern.value(of: $0, sector: sector)
                }
                let expected = latest.withLock { $0[sector] }
                if unknown.withLock({ $0.contains(sector) }) { continue }
                guard found == expected else {
                    throw CrashWorkload.WrongRead(
                        description: "sector \(sector) reads \(CrashModel.words(found))"
                            + ", \(expected) was written last")
                }
            }
        }
    }

    // MARK: What they stop for

    /// Runs `body` while no client has a step under way, then looks what the disk holds now.
    func stopping(_ body: () throws -> Void) throws {
        gate.withLock { $0.isClosed = true }
        defer {
            gate.withLock { $0.isClosed = false }
            gate.announceChange()
        }
        _ = gate.waitFor { $0.insideCount == 0 ? true : nil }
        try body()
        let values = try Self.values(of: image)
        latest.withLock { $0 = values }
    }

    /// The disk has become larger.
    func grow(to sectorCount: Int) {
        latest.withLock { latest in
            latest += [UInt64](repeating: 0, count: max(0, sectorCount - latest.count))
        }
    }
}
