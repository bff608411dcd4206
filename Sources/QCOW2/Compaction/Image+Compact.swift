/// What compacting an image has done.
public struct Compaction: Sendable, Equatable {
    /// Bytes of the file before.
    public internal(set) var oldByteCount: UInt64 = 0
    /// Bytes of the file after.
    public internal(set) var newByteCount: UInt64 = 0
    /// Clusters that lie at another place of the file now.
    public internal(set) var movedClusterCount: UInt64 = 0
    /// L2 tables without a word in them, and refcount blocks that count nothing any more.
    public internal(set) var freedTableCount: UInt64 = 0
    /// Clusters that nothing used and nothing could use.
    public internal(set) var freedLeakCount: UInt64 = 0

    /// Whether the image is as it was.
    public var isNothing: Bool {
        oldByteCount == newByteCount && movedClusterCount == 0 && freedTableCount == 0
            && freedLeakCount == 0
    }
}

extension Image {
    /// Moves the clusters at the end of the file at `path` into free space before them, and ends
    /// the file behind the last cluster that is left.
    ///
    /// Needs no space but the file's own.  Whenever it is interrupted the image reads the same:
    /// at worst clusters are wasted, which the next run or a repair frees.  What lies in other
    /// files, backing files and an external data file, is not looked at.
    ///
    /// - Parameters:
    ///   - path: The image.
    ///   - passphrases: Where the key of an image with LUKS comes from, whose sectors are encrypted
    ///     according to their places; asked for only where guest data has to move.
    ///   - progress: Told what part is done, rising from 0 to 1; false cancels: what was moved
    ///     until then stays moved.
    /// - Throws: `.locked`, `.markedCorrupt`; `.corrupt` where a check finds errors; `.encryption`
    ///   without the right passphrase; `.cancelled`; `.system`.
    @discardableResult
    public static func compact(
        _ path: String, passphrases: PassphraseSource = PassphraseSource(),
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) -> Compaction {
        let device = try FileDevice(path: path, access: .readWrite, mapsBytes: false)
        defer { device.close() }
        try ImageLock.take(.writer, on: device)
        return try compact(on: device, passphrases: passphrases, progress: progress)
    }

    /// Compacts the image on a device that nobody else uses, as `compact(_:passphrases:progress:)`
    /// does.
    /// - Throws: what that throws, but for `.locked`.
    @discardableResult
    public static func compact(
        on device: any BlockDevice, passphrases: PassphraseSource = PassphraseSource(),
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) -> Compaction {
        let file = try HostFile(device)
        // What a killed predecessor left in the page cache becomes durable before it is believed.
        try file.flush()
        let header = try Header.readSupported(from: device)
        guard !header.incompatibleFeatures.contains(.corrupt) else {
            throw ImageError(.markedCorrupt, file: device.name)
        }
        if header.incompatibleFeatures.contains(.dirty) { try settle(device) }
        return try Compactor(file, passphrases, progress ?? { _ in true }).run()
    }

    /// Compacts an image in steps of `stepByteCount` bytes or more, for tests of what lies between.
    @discardableResult
    package static func compact(
        on device: any BlockDevice, passphrases: PassphraseSource = PassphraseSource(),
        stepByteCount: UInt64, progress: @escaping (Double) -> Bool
    ) throws(ImageError) -> Compaction {
        var compactor = Compactor(try HostFile(device), passphrases, progress)
        compactor.stepByteCount = stepByteCount
        return try compactor.run()
    }

    /// Opening an image that was not closed rebuilds its counts.
    private static func settle(_ device: any BlockDevice) throws(ImageError) {
        let image = try Image.open(
            device, dataFile: device, options: OpenOptions(passphrases: .locked))
        try image.finish()
    }
}

/// Compacts an image in passes, until one has nothing to do.
///
/// A pass moves a part of what is to be moved, the highest clusters first, so that an interruption
/// costs no more than that part, and so that the file gets shorter, and its file system gets space
/// back, as the work goes on.
struct Compactor {
    private let file: HostFile
    private let passphrases: PassphraseSource
    private let progress: (Double) -> Bool

    /// Passes that a run takes at most; each of them moves clusters towards the start.
    private static let passLimit = 64
    /// Bytes that a pass copies at least, if there are so many; it is an eighth of all otherwise.
    var stepByteCount: UInt64 = 1 << 30

    init(
        _ file: HostFile, _ passphrases: PassphraseSource, _ progress: @escaping (Double) -> Bool
    ) {
        self.file = file
        self.passphrases = passphrases
        self.progress = progress
    }

    func run() throws(ImageError) -> Compaction {
        var result = Compaction()
        result.oldByteCount = file.writtenEnd
        var examination = try examine()
        if examination.result.leakCount > 0 {
            let repair = try ImageRepair(on: file.device, scope: .leaks, undoPath: nil)
            result.freedLeakCount = repair.fixedLeakCount
            examination = try examine()
        }
        let key = try key(examination.header)
        var meter = CompactionMeter(progress)
        for _ in 0..<Self.passLimit {
            let survey = try CompactionSurvey(examination, of: file)
            let plan = try CompactionPlan(survey)
            meter.begin(plan.byteCount)
            if meter.isCancelled { throw ImageError(.cancelled, file: file.name) }
            var pass = CompactionPass(file, survey, plan, key)
            let isAnything = try pass.run(
                limit: max(stepByteCount, meter.total / 8), &meter)
            result.movedClusterCount &+= pass.movedClusterCount
            result.freedTableCount &+= pass.freedTableCount
            if meter.isCancelled { throw ImageError(.cancelled, file: file.name) }
            guard isAnything else { break }
            examination = try examine()
        }
        result.newByteCount = file.writtenEnd
        return result
    }

    /// Nothing is moved of an image whose tables are not all right.
    private func examine() throws(ImageError) -> Examination {
        let examination = try Examination(file.device)
        let found = examination.result.corruptionCount &+ examination.result.errorCount
        guard found == 0 else {
            throw file.corrupt(
                "a check finds \(found) errors, so that nothing may be moved: "
                    + "repair it first, with check --repair all")
        }
        return examination
    }

    /// What encrypts guest data anew where it depends on the place in the file.
    private func key(_ header: Header) throws(ImageError) -> CompactionKey? {
        guard header.encryptionMethod == 2 else { return nil }
        return CompactionKey(header, passphrases, file)
    }
}

/// The key of an image with LUKS, taken when it is needed.
final class CompactionKey {
    private let header: Header
    private let file: HostFile
    private var unlocker: Unlocker
    private var opened: EncryptedData?

    init(_ header: Header, _ passphrases: PassphraseSource, _ file: HostFile) {
        self.header = header
        self.file = file
        unlocker = Unlocker(passphrases)
    }

    deinit { opened?.close() }

    func data() throws(ImageError) -> EncryptedData {
        if let opened { return opened }
        let found = try unlocker.unlock(header, in: file, isWritable: true)
        guard let found else { throw ImageError(.encryption(.locked), file: file.name) }
        opened = found
        return found
    }
}

/// How far a compaction has come, by the bytes copied.
struct CompactionMeter {
    private(set) var total: UInt64 = 0
    private(set) var isCancelled = false
    private var done: UInt64 = 0
    private var part = 0.0
    private let progress: (Double) -> Bool

    init(_ progress: @escaping (Double) -> Bool) { self.progress = progress }

    /// A pass begins, after which nothing is left but `byteCount` bytes.
    mutating func begin(_ byteCount: UInt64) {
        total = max(total, done &+ byteCount)
        add(0)
    }

    mutating func add(_ byteCount: UInt64) {
        done &+= byteCount
        part = max(part, min(Double(done) / Double(max(total, 1)), 1))
        if !progress(part) { isCancelled = true }
    }
}
