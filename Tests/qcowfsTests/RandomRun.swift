import Glibc
import TestSupport

/// Threads that use a mounted disk as programs do, beside a model of it.
///
/// Where a run `changesStructure`, snapshots come, go and are applied and the disk changes its
/// size: beside the threads and between them, through the daemon, through the file itself, and
/// while nothing is mounted.
final class RandomRun {
    struct Difference: Error, CustomStringConvertible { let description: String }

    let combination: Combination
    let seed: UInt64
    var threadCount = 3
    var stepCount = TestEnvironment.isLong ? 600 : 45
    var roundCount = TestEnvironment.isLong ? 6 : 2
    var mountOptions: [String] = []
    let changesStructure: Bool
    /// For a test of the judge itself: called with the image before it is judged.
    var tamper: ((String) throws -> Void)?

    let folder: TemporaryDirectory
    let image: EncryptedImage
    var model: ReferenceDisk
    var snapshots: [String: ReferenceDisk]
    let bitmaps: [BitmapModel]
    /// Bytes of the data file; QEMU makes whole clusters of it.
    var dataFileByteCount: Int
    var random: RepeatableRandom
    /// What was done, for whoever looks for a mistake.
    var history: [String] = []
    /// How snapshots are named that come.
    var nextName = 1
    /// `--passphrase-file` for each passphrase.
    let passphraseOptions: [String]

    init(_ combination: Combination, seed: UInt64, changesStructure: Bool = false) throws {
        self.combination = combination
        self.seed = seed
        self.changesStructure = changesStructure
        // Each kind of image has its own story.
        random = RepeatableRandom(
            seed: combination.testDescription.utf8.reduce(seed) { $0 &* 31 &+ UInt64($1) })
        folder = try TemporaryDirectory()
        let prepared = try combination.prepare(in: folder, seed: seed)
        (image, model) = (prepared.image, prepared.model)
        (snapshots, bitmaps) = (prepared.snapshots, prepared.bitmaps)
        let dataFile = combination.dataFileName(in: folder)
        dataFileByteCount =
            combination.dataFile == nil ? 0 : try TestFile(dataFile, O_RDONLY).byteCount()
        var options: [String] = []
        let below = image.encryptedBelow.map(\.passphrase)
        for words in (image.isEncrypted ? [image.passphrase] : []) + below {
            options += ["--passphrase-file", try folder.write(Array(words.utf8), to: words)]
        }
        passphraseOptions = options
    }

    /// Runs, remounting between the rounds, and judges the image at the end.
    func run() throws {
        do {
            var ranges: [Range<Int>] = []
            for round in 0..<roundCount {
                if changesStructure, round > 0 { try changeUnmounted() }
                ranges = try useMounted(round)
            }
            try tamper?(image.path)
            try judge(dataRanges: ranges)
        } catch  where !history.isEmpty {
            throw Difference(
                description: "\(error); after \(history.suffix(12).joined(separator: "; "))")
        }
    }

    /// A round, from one mount to the end of it; returns the ranges of the disk that are data.
    private func useMounted(_ round: Int) throws -> [Range<Int>] {
        history.append("mount")
        let options =
            mountOptions + passphraseOptions
            + (changesStructure ? ["--snapshots", "-o", "shrink"] : [])
        let mount = try TestMount(image.path, in: folder, options: options)
        if changesStructure {
            for part in 0..<(TestEnvironment.isLong ? 8 : 3) {
                try useAndChange(mount, part: round * 100 + part)
                try changeMounted(mount)
                try Self.compare(mount.disk, with: model)
            }
        } else {
            try use(mount, part: round, steps: stepCount)
        }
        let ranges = try inspect(mount)
        try mount.unmount()
        return ranges
    }

    /// Compares everything that is shown and returns the disk's data ranges; the files are closed
    /// on return, for an open one keeps a mount busy.
    private func inspect(_ mount: TestMount) throws -> [Range<Int>] {
        try Self.compare(mount.disk, with: model)
        if changesStructure {
            for (name, kept) in snapshots {
                try Self.compare(snapshotFile(name, of: mount), with: kept)
            }
        }
        return try mount.open(O_RDONLY).dataRanges()
    }

    func snapshotFile(_ name: String, of mount: TestMount) -> String {
        mount.mountpoint + "/disk@\(name).raw"
    }

    /// Threads use the disk, and `meanwhile` is run beside them.
    /// - Parameters:
    ///   - change: what `meanwhile` does.
    func use(
        _ mount: TestMount, part: Int, steps: Int, beside change: StructureChange? = nil,
        _ meanwhile: @escaping @Sendable () throws -> Void = {}
    ) throws {
        let reservations = RangeReservations()
        let (clusterSize, seed, model, bitmaps) = (combination.clusterSize, seed, model, bitmaps)
        let threadCount = threadCount
        let newSize = change?.newSize ?? model.byteCount
        let isKnown = change?.replacesDisk != true
        try onThreads(threadCount + (change == nil ? 0 : 1)) { index in
            if index == threadCount { return try meanwhile() }
            let user = try DiskUser(
                file: mount.open(), model: model, reservations: reservations,
                clusterSize: clusterSize, bitmaps: bitmaps,
                byteCount: min(newSize, model.byteCount),
                largestByteCount: max(newSize, model.byteCount), isKnown: isKnown)
            var random = RepeatableRandom(
                seed: seed &* 1009 &+ UInt64(part) &* 31 &+ UInt64(index))
            for _ in 0..<steps { try user.step(&random) }
        }
    }

    /// Throws where the file at `path` does not hold what `model` holds.
    static func compare(_ path: String, with model: ReferenceDisk) throws {
        let file = try TestFile(path, O_RDONLY)
        guard try file.byteCount() == model.byteCount else {
            throw Difference(
                description: "\(path) has \(try file.byteCount()) bytes, not \(model.byteCount)")
        }
        for start in stride(from: 0, to: model.byteCount, by: 1.MiB) {
            let range = start..<min(start + 1.MiB, model.byteCount)
            let bytes = try file.read(range)
            if let place = bytes.withUnsafeBytes({ model.firstDifference(in: range, from: $0) }) {
                throw Difference(description: "\(path) differs from its model at \(place)")
            }
        }
    }
}
