/// What checking an image's metadata found out.
public struct ImageCheck: Sendable, Equatable {
    /// Findings which mean that data is damaged or may become so.
    public var corruptionCount: UInt64 = 0
    /// Clusters that nothing uses and nothing can use.
    public var leakCount: UInt64 = 0
    /// Things that could not be checked.
    public var errorCount: UInt64 = 0

    /// Clusters of the virtual disk.
    public var totalClusterCount: UInt64 = 0
    /// Guest clusters that have a host cluster or a compressed stream.
    public var allocatedClusterCount: UInt64 = 0
    /// Guest clusters that do not follow their predecessor in the file.
    public var fragmentedClusterCount: UInt64 = 0
    /// Guest clusters that are compressed.
    public var compressedClusterCount: UInt64 = 0
    /// The end of the last host cluster in use, in bytes.
    public var imageEndOffset: UInt64 = 0

    /// Checks the image at `path`, and changes nothing.
    ///
    /// - Parameters:
    ///   - path: Where the image is.
    ///   - locking: What keeps writers away meanwhile.
    ///   - threadCount: How many L2 tables are read at once; at 1 no thread is started.
    ///   - report: Gets each finding as it is met.
    ///   - progress: Told what part is done, from 0 to 1, as the check goes on; false cancels.
    /// - Throws: What opening throws, `.system` or `.malformed` where the walk cannot go on, and
    ///   `.cancelled`.
    public init(
        path: String, locking: OpenOptions.Locking = .required, threadCount: Int = 1,
        report: @escaping (CheckFinding) -> Void = { _ in }, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        defer { device.close() }
        try ImageLock.take(locking == .required ? .reader : .forceShare, on: device)
        try self.init(device, threadCount: threadCount, report: report, progress: progress)
    }

    /// Checks the image on a device, likewise.
    /// - Throws: `.system` or `.malformed` where the walk cannot go on, and `.cancelled`.
    public init(
        _ device: any BlockDevice, threadCount: Int = 1,
        report: @escaping (CheckFinding) -> Void = { _ in }, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        self = try Examination(
            device, threadCount: threadCount, report: report, progress: progress
        ).result
    }

    init() {}
}

/// A check with everything that it has read: what a repair goes by.
struct Examination {
    let header: Header
    let walk: ReferenceWalk
    var stored: StoredRefcounts
    /// Findings that limit what a repair can do.
    let obstacles: CheckFinding.Obstacles
    let result: ImageCheck

    init(
        _ device: any BlockDevice, threadCount: Int = 1,
        report: @escaping (CheckFinding) -> Void = { _ in }, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        header = try Header.readSupported(from: device)
        let tally = Tally(of: device.name, report: report, progress: progress)
        var walk = try ReferenceWalk(
            device, header: header, threadCount: threadCount, tableRead: tally.tableRead,
            report: tally.add)
        if progress != nil { tally.tableCount = try walk.tableCount() }
        try walk.run()
        stored = try StoredRefcounts(device, header: header)
        let highest = try Self.compare(walk, &stored, tally)
        try Self.checkCopiedFlags(walk, &stored, tally)
        self.walk = walk
        obstacles = tally.obstacles

        var result = ImageCheck()
        result.corruptionCount = tally.corruptions
        result.leakCount = tally.leaks
        result.errorCount = tally.unchecked
        let cluster = header.clusterByteCount
        result.totalClusterCount =
            header.virtualByteCount / cluster
            + (header.virtualByteCount % cluster == 0 ? 0 : 1)
        result.allocatedClusterCount = walk.figures.allocated
        result.fragmentedClusterCount = walk.figures.fragmented
        result.compressedClusterCount = walk.figures.compressed
        result.imageEndOffset = (highest &+ 1) &* cluster
        self.result = result
    }

    // MARK: Judging the counts

    /// Compares stored with computed counts, and returns the highest cluster that has either.
    private static func compare(
        _ walk: ReferenceWalk, _ stored: inout StoredRefcounts, _ tally: Tally
    ) throws(ImageError) -> UInt64 {
        // What lies past the end of the file and is not referenced does not matter.
        let end = walk.clusterEnd
        var highest: UInt64 = 0
        var counts = walk.counts.reader
        for range in (walk.counts.touchedRanges + stored.coveredRanges).merged {
            for cluster in range.clamped(to: 0..<end) {
                let found = counts.count(of: cluster)
                guard let count = try stored.count(of: cluster) else {
                    if found > 0 { highest = cluster }
                    tally.add(
                        .unreadableCount(cluster: cluster, block: stored.blockIndex(of: cluster)))
                    continue
                }
                if count > 0 || found > 0 { highest = cluster }
                if count > found {
                    tally.add(.leak(cluster: cluster, stored: count, found: found))
                } else if count < found {
                    tally.add(.countTooLow(cluster: cluster, stored: count, found: found))
                }
            }
        }
        return highest
    }

    /// COPIED says that the stored count is 1: both ways, and only in the active tables.
    private static func checkCopiedFlags(
        _ walk: ReferenceWalk, _ stored: inout StoredRefcounts, _ tally: Tally
    ) throws(ImageError) {
        let bits = UInt64(walk.header.clusterBits)
        let hasDataFile = walk.header.hasDataFile
        var tables: [UInt64] = []
        for (index, entry) in try walk.activeL1Entries() {
            guard entry.offset != 0, let count = try stored.count(of: entry.offset >> bits) else {
                continue
            }
            if (count == 1) != entry.isCopied {
                tally.add(.l2TableCopied(index: index, entry: entry.bits, stored: count))
            }
            tables.append(entry.offset)
        }
        try walk.l2Tables.forEach(at: tables) { table throws(ImageError) in
            try table.forEachEntry { entry throws(ImageError) in
                guard !entry.isCompressed, entry.hasCluster(inDataFile: hasDataFile) else { return }
                // Nothing in a data file has a second reference.
                let count = hasDataFile ? 1 : try stored.count(of: entry.offset >> bits)
                guard let count, (count == 1) != entry.isCopied else { return }
                tally.add(.clusterCopied(entry: entry.bits, stored: count))
            }
        }
    }
}

/// Counts findings by their weight, and tables as they are read, while both are passed on.
private final class Tally {
    private(set) var corruptions: UInt64 = 0
    private(set) var leaks: UInt64 = 0
    private(set) var unchecked: UInt64 = 0
    private(set) var obstacles: CheckFinding.Obstacles = []
    /// How many tables there are to read.
    var tableCount: UInt64 = 0
    private var tablesRead: UInt64 = 0
    private let report: (CheckFinding) -> Void
    private let progress: ((Double) -> Bool)?
    private let name: String

    init(
        of name: String, report: @escaping (CheckFinding) -> Void, progress: ((Double) -> Bool)?
    ) {
        self.name = name
        self.report = report
        self.progress = progress
    }

    func tableRead() throws(ImageError) {
        guard let progress else { return }
        tablesRead += 1
        guard progress(min(Double(tablesRead) / Double(max(tableCount, 1)), 1)) else {
            throw ImageError(.cancelled, file: name)
        }
    }

    func add(_ finding: CheckFinding) {
        switch finding.severity {
        case .corruption: corruptions += 1
        case .leak: leaks += 1
        case .unchecked: unchecked += 1
        }
        obstacles.formUnion(finding.obstacles)
        report(finding)
    }
}
