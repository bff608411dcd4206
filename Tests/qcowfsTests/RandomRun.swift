import Glibc
import Synchronization
import TestSupport

/// A kind of image that random runs can use.
protocol RandomRunSubject: Sendable {
    var clusterSize: Int { get }
    /// The image, what its disk holds, and what its snapshots hold.
    func prepare(in folder: TemporaryDirectory, seed: UInt64) throws -> Combination.Prepared
}

/// Threads that use a mounted disk as programs do, beside a model of it.
struct RandomRun {
    struct Difference: Error, CustomStringConvertible { let description: String }

    let combination: any RandomRunSubject
    let seed: UInt64
    var threadCount = 3
    var stepCount = TestEnvironment.isLong ? 600 : 45
    var roundCount = TestEnvironment.isLong ? 6 : 2
    var mountOptions: [String] = []
    /// Called with the image before it is used.
    var prepare: ((String) throws -> Void)?
    /// Notes every range that is changed.
    var changes: ChangeLog?
    /// For a test of the judge itself: called with the image before it is judged.
    var tamper: ((String) throws -> Void)?

    /// Runs, remounting between the rounds, and judges the image at the end.
    func run() throws {
        let folder = try TemporaryDirectory()
        let prepared = try combination.prepare(in: folder, seed: seed)
        try prepare?(prepared.image)
        var ranges: [Range<Int>] = []
        for round in 0..<roundCount {
            let mount = try TestMount(prepared.image, in: folder, options: mountOptions)
            try use(mount, prepared.model, round: round)
            ranges = try inspect(mount, prepared.model)
            try mount.unmount()
        }
        try tamper?(prepared.image)
        try judge(prepared, in: folder, dataRanges: ranges)
        try prepared.alsoJudge?(prepared.model)
    }

    /// Compares the whole disk and returns its data ranges; the file is closed on return, for an
    /// open one keeps a mount busy.
    private func inspect(_ mount: TestMount, _ model: ReferenceDisk) throws -> [Range<Int>] {
        let file = try mount.open(O_RDONLY)
        try compare(file, with: model)
        return try file.dataRanges()
    }

    private func use(_ mount: TestMount, _ model: ReferenceDisk, round: Int) throws {
        let reservations = RangeReservations()
        let (combination, seed, stepCount) = (combination, seed, stepCount)
        let changes = changes
        try onThreads(threadCount) { index in
            let user = try DiskUser(
                file: mount.open(), model: model, reservations: reservations,
                clusterSize: combination.clusterSize, changes: changes)
            var random = RepeatableRandom(
                seed: seed &* 1009 &+ UInt64(round) &* 31 &+ UInt64(index))
            for _ in 0..<stepCount { try user.step(&random) }
        }
    }

    private func compare(_ file: TestFile, with model: ReferenceDisk) throws {
        guard try file.byteCount() == model.byteCount else {
            throw Difference(description: "the disk has \(try file.byteCount()) bytes")
        }
        for start in stride(from: 0, to: model.byteCount, by: 1.MiB) {
            let range = start..<min(start + 1.MiB, model.byteCount)
            let bytes = try file.read(range)
            if let place = bytes.withUnsafeBytes({ model.firstDifference(in: range, from: $0) }) {
                throw Difference(description: "the mounted disk differs from the model at \(place)")
            }
        }
    }

    /// QEMU's tools and the tests' own reader have the last word.
    private func judge(
        _ prepared: Combination.Prepared, in folder: TemporaryDirectory, dataRanges: [Range<Int>]
    ) throws {
        if let encrypted = prepared.encrypted {
            return try judge(encrypted, prepared, in: folder, dataRanges: dataRanges)
        }
        let image = prepared.image
        let check = try QemuImg.check(image)
        guard check.status == 0 else { throw Difference(description: "\(check)") }
        let raw = folder.file("model.raw")
        try prepared.model.save(to: raw)
        if let difference = try QemuImg.difference(raw, image) {
            throw Difference(description: difference)
        }
        let mapped = try QemuImg.dataRanges(image)
        if let difference = firstDifference(dataRanges, mapped) {
            throw Difference(
                description: "holes: lseek said \(difference.0 ?? 0..<0), qemu-img map "
                    + "\(difference.1 ?? 0..<0)")
        }
        let reference = try ReferenceImage(image)
        let audit = try reference.qcow2.audit()
        guard audit.faults.isEmpty, audit.leakCount == 0 else {
            throw Difference(description: "\(audit.faults), \(audit.leakCount) leaks")
        }
        for snapshot in try reference.qcow2.snapshots().entries {
            guard let kept = prepared.snapshots[snapshot.name] else { continue }
            if let place = try reference.firstDifference(from: kept, through: snapshot.table) {
                throw Difference(description: "snapshot \(snapshot.name) changed at \(place)")
            }
        }
        guard try reference.qcow2.snapshots().entries.count == prepared.snapshots.count else {
            throw Difference(description: "a snapshot is gone")
        }
    }

    func firstDifference(
        _ ours: [Range<Int>], _ theirs: [Range<Int>]
    ) -> (Range<Int>?, Range<Int>?)? {
        for index in 0..<max(ours.count, theirs.count) {
            let our = index < ours.count ? ours[index] : nil
            let their = index < theirs.count ? theirs[index] : nil
            if our != their { return (our, their) }
        }
        return nil
    }
}

/// One thread's use of a mounted disk.
struct DiskUser {
    let file: TestFile
    let model: ReferenceDisk
    let reservations: RangeReservations
    let clusterSize: Int
    var changes: ChangeLog?

    func step(_ random: inout RepeatableRandom) throws {
        let range = range(&random)
        let kind = random.number(below: 20)
        var noise = random
        _ = try reservations.with(range) {
            switch kind {
            case 0..<7: try write(range, &noise)
            case 7..<9: try change(range) { try file.punch(range) }
            case 9..<11: try change(range) { try file.zero(range) }
            case 11..<15: try read(range)
            case 15..<17: try seek(range)
            case 17: try file.sync()
            case 18: try file.syncData()
            default: try file.allocate(FALLOC_FL_KEEP_SIZE, range)
            }
        }
        _ = random.next()
    }

    /// Anything from a byte to a few clusters; half of them aligned to sectors or clusters.
    private func range(_ random: inout RepeatableRandom) -> Range<Int> {
        let unit = [1, 512, 4096, clusterSize][random.number(below: 4)]
        let most = max(1, min(max(clusterSize * 2, 16.KiB), 256.KiB, model.byteCount / 8) / unit)
        let count = min((1 + random.number(below: most)) * unit, model.byteCount)
        // The end of the disk is where partial clusters are: go there now and then.
        if random.chance(oneIn: 12) { return model.byteCount - count..<model.byteCount }
        let start = random.number(below: (model.byteCount - count) / unit + 1) * unit
        return start..<start + count
    }

    private func write(_ range: Range<Int>, _ random: inout RepeatableRandom) throws {
        var bytes = [UInt8](repeating: UInt8(1 + random.number(below: 255)), count: range.count)
        // Mark every sector, so that a misplaced one shows.
        for position in stride(from: 0, to: bytes.count, by: 512) {
            bytes[position] = UInt8(truncatingIfNeeded: (range.lowerBound + position) / 512)
        }
        changes?.note(range)
        try file.write(bytes, at: range.lowerBound)
        bytes.withUnsafeBytes { model.write($0, at: range.lowerBound) }
    }

    /// Makes `range` read zero, and looks.
    private func change(_ range: Range<Int>, _ body: () throws -> Void) throws {
        changes?.note(range)
        try body()
        model.zero(range)
        try read(range)
    }

    private func read(_ range: Range<Int>) throws {
        let bytes = try file.read(range)
        if let place = bytes.withUnsafeBytes({ model.firstDifference(in: range, from: $0) }) {
            throw RandomRun.Difference(
                description: "a read of \(range) differs from the model at \(place)")
        }
    }

    /// What lseek calls a hole must be zero in the model.
    private func seek(_ range: Range<Int>) throws {
        let data = try file.nextData(from: range.lowerBound) ?? model.byteCount
        let hole = range.lowerBound..<min(data, range.upperBound)
        if !hole.isEmpty, !UnsafeRawBufferPointer(model[hole]).isZero {
            throw RandomRun.Difference(description: "SEEK_DATA leaps over data in \(hole)")
        }
        let end = try file.nextHole(from: range.lowerBound)
        guard end >= range.lowerBound, end <= model.byteCount else {
            throw RandomRun.Difference(description: "SEEK_HOLE answers \(end)")
        }
    }
}

/// The ranges that threads have changed.
final class ChangeLog: Sendable {
    private let ranges = Mutex<[Range<Int>]>([])

    func note(_ range: Range<Int>) { ranges.withLock { $0.append(range) } }

    /// The numbers of the granules that changed, ascending.
    func granules(of granularity: Int) -> [Int] {
        let all = ranges.withLock { $0 }.filter { !$0.isEmpty }
        return Set(
            all.flatMap {
                $0.lowerBound / granularity...($0.upperBound - 1) / granularity
            }
        ).sorted()
    }
}
