import Glibc
import TestSupport
import Testing

/// Disks with three snapshots in their images, used by several threads through a real mount, while
/// snapshots come, go and are applied and the disk changes its size.
@Suite("Random run with snapshots", .serialized)
struct SnapshotRunTests {
    static let combinations: [Combination] = [512, 4096, 65536].flatMap { clusterSize in
        [(2, 16), (3, 8), (3, 16), (3, 64)].map { version, refcountBits in
            Combination(
                clusterSize: clusterSize, version: version, refcountBits: refcountBits,
                content: .snapshots)
        }
    }

    @Test(
        "The disk and every snapshot equal their models, and QEMU agrees", .enabledWhereMountable,
        arguments: combinations)
    func equalsModels(_ combination: Combination) throws {
        let seed = TestEnvironment.seed
        do {
            let run = try SnapshotRun(combination, seed: seed)
            try run.run()
        } catch {
            Issue.record("\(combination.testDescription), seed \(seed): \(error)")
        }
    }
}

/// One such run.
private final class SnapshotRun {
    private let combination: Combination
    private let folder: TemporaryDirectory
    private let image: String
    private var model: ReferenceDisk
    private var snapshots: [String: ReferenceDisk]
    /// What was read of snapshots that were made while threads wrote: nobody knows it before.
    private var random: RepeatableRandom
    private let seed: UInt64
    private var nextName = 1

    init(_ combination: Combination, seed: UInt64) throws {
        self.combination = combination
        self.seed = seed
        random = RepeatableRandom(seed: seed)
        folder = try TemporaryDirectory()
        let prepared = try combination.prepare(in: folder, seed: seed)
        (image, model, snapshots) = (prepared.image, prepared.model, prepared.snapshots)
    }

    func run() throws {
        try snapshot("-c", "third", image)
        snapshots["third"] = copy(model, byteCount: model.byteCount)
        let mount = try TestMount(image, in: folder, options: ["--snapshots"])
        for round in 0..<(TestEnvironment.isLong ? 30 : 7) {
            try use(mount, round: round)
            try changeStructure(mount)
            try compare(mount.disk, with: model)
        }
        for (name, kept) in snapshots {
            let file = mount.mountpoint + "/disk@\(name).raw"
            try compare(file, with: kept)
        }
        try mount.unmount()
        try judge()
    }

    /// Threads use the disk; now and then a snapshot is made meanwhile.
    private func use(_ mount: TestMount, round: Int) throws {
        let reservations = RangeReservations()
        let (combination, seed, model) = (combination, seed, model)
        let makesSnapshot = random.chance(oneIn: 2)
        let name = "live\(round)"
        let image = image
        try onThreads(3 + (makesSnapshot ? 1 : 0)) { index in
            guard index < 3 else {
                usleep(3000)
                try Command.require(TestEnvironment.program, "snapshot", "-c", name, image)
                return
            }
            let user = try DiskUser(
                file: mount.open(), model: model, reservations: reservations,
                clusterSize: combination.clusterSize, changes: nil)
            var random = RepeatableRandom(
                seed: seed &* 1009 &+ UInt64(round) &* 31 &+ UInt64(index))
            for _ in 0..<20 { try user.step(&random) }
        }
        guard makesSnapshot else { return }
        // What it holds nobody can tell but itself; from here on it must not change.
        let kept = ReferenceDisk(byteCount: model.byteCount)
        let file = try TestFile(mount.mountpoint + "/disk@\(name).raw", O_RDONLY)
        try file.read(into: kept.bytes, at: 0)
        snapshots[name] = kept
    }

    private func changeStructure(_ mount: TestMount) throws {
        switch random.number(below: combination.version == 2 ? 6 : 10) {
        case 0..<2:
            let name = "made\(nextName)"
            nextName += 1
            try snapshot("-c", name, image)
            snapshots[name] = copy(model, byteCount: model.byteCount)
        case 2..<4:
            guard let name = anyName() else { return }
            try snapshot("-a", name, image)
            if let kept = snapshots[name] { model = copy(kept, byteCount: kept.byteCount) }
        case 4..<6:
            guard snapshots.count > 3, let name = anyName() else { return }
            try snapshot("-d", name, image)
            snapshots[name] = nil
        default:
            let least = max(combination.byteCount / 2, 64.KiB)
            let size = (least + random.number(below: combination.byteCount * 2)) / 512 * 512
            try Command.require(
                TestEnvironment.program, "resize", "--shrink", image, "\(size)")
            model = copy(model, byteCount: size)
        }
    }

    private func anyName() -> String? {
        let names = snapshots.keys.sorted()
        return names.isEmpty ? nil : names[random.number(below: names.count)]
    }

    private func snapshot(_ words: String...) throws {
        try Command.require([TestEnvironment.program, "snapshot"] + words)
    }

    /// The bytes of a disk that was made another size; new ones are zeros.
    private func copy(_ disk: ReferenceDisk, byteCount: Int) -> ReferenceDisk {
        let copy = ReferenceDisk(byteCount: byteCount)
        let range = 0..<min(byteCount, disk.byteCount)
        copy.write(UnsafeRawBufferPointer(disk[range]), at: 0)
        return copy
    }

    private func compare(_ path: String, with model: ReferenceDisk) throws {
        let file = try TestFile(path, O_RDONLY)
        guard try file.byteCount() == model.byteCount else {
            throw RandomRun.Difference(
                description: "\(path) has \(try file.byteCount()) bytes, not \(model.byteCount)")
        }
        for start in stride(from: 0, to: model.byteCount, by: 1.MiB) {
            let range = start..<min(start + 1.MiB, model.byteCount)
            let bytes = try file.read(range)
            if let place = bytes.withUnsafeBytes({ model.firstDifference(in: range, from: $0) }) {
                throw RandomRun.Difference(
                    description: "\(path) differs from its model at \(place)")
            }
        }
    }

    /// QEMU's tools have the last word.
    private func judge() throws {
        let check = try QemuImg.check(image)
        guard check.status == 0 else { throw RandomRun.Difference(description: "\(check)") }
        let raw = folder.file("model.raw")
        try model.save(to: raw)
        if let difference = try QemuImg.difference(raw, image) {
            throw RandomRun.Difference(description: difference)
        }
        let info = try Command.require("qemu-img", "info", image)
        guard info.contains("(\(model.byteCount) bytes)") else {
            throw RandomRun.Difference(description: "another size: \(info)")
        }
        let reader = try ReferenceImage(image).qcow2
        let audit = reader.audit()
        guard audit.faults.isEmpty, audit.leakCount == 0 else {
            throw RandomRun.Difference(description: "\(audit.faults), \(audit.leakCount) leaks")
        }
        let names = try Set(reader.snapshots().entries.map(\.name))
        guard names == Set(snapshots.keys) else {
            throw RandomRun.Difference(description: "the snapshots are \(names.sorted())")
        }
        for (name, kept) in snapshots {
            unlink(folder.file("kept.raw"))
            try QemuImg.convert(
                image, to: folder.file("kept.raw"), from: "qcow2", format: "raw",
                flags: ["-l", name])
            // QEMU gives every snapshot the disk's present size: what both have is compared here,
            // and all of it with the tests' own reader.
            let size = min(kept.byteCount, model.byteCount)
            let theirs = try TestFile(folder.file("kept.raw"), O_RDONLY).read(0..<size)
            let place = theirs.withUnsafeBytes { kept.firstDifference(in: 0..<size, from: $0) }
            if let place {
                throw RandomRun.Difference(description: "\(name): QEMU differs at \(place)")
            }
            let entry = try reader.snapshots().entries.first { $0.name == name }
            // Through the snapshot's own table: the disk may be smaller now.
            guard let entry, entry.byteCount == kept.byteCount,
                try reader.read(0..<kept.byteCount, through: entry.table)
                    .elementsEqual(kept.bytes)
            else { throw RandomRun.Difference(description: "snapshot \(name) has changed") }
        }
    }
}
