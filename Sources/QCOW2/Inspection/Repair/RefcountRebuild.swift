/// A refcount table and blocks made from nothing but the references, behind the end of the file,
/// with a copy of the L1 table where something else lies in the old one.
struct RefcountRebuild {
    private(set) var newStructures: [RepairPlan.Edit] = []
    private let header: Header
    private let counts: ReferenceCounts
    let tableOffset: UInt64
    let tableClusterCount: UInt64
    let l1Offset: UInt64
    /// Whether something else lies in the L1 table's clusters.
    let movesL1: Bool
    private let keepsUnreferenced: Bool
    private let fileClusterCount: UInt64
    private let own: Range<UInt64>
    private let pastTheEnd: [Range<UInt64>]
    /// The clusters of an L1 table that is left behind.
    private let formerL1: Range<UInt64>
    private var headerSector: [UInt8]

    var description: String {
        "count all references anew in blocks at \(hex(tableOffset)) and behind"
            + (movesL1 ? ", and copy the L1 table to \(hex(l1Offset))" : "")
    }

    /// - Parameters:
    ///   - header: What the image is counted by; its refcount width is that of the new blocks.
    ///   - keepsUnreferenced: Whether every cluster of the file counts as used, because
    ///     references may be hidden.
    ///   - tableRead: Called for each L2 table; what it throws ends the work.
    ///   - report: Gets what is met on the way.
    init(
        _ device: any BlockDevice, header: Header, keepsUnreferenced: Bool = false,
        tableRead: @escaping () throws(ImageError) -> Void = {},
        report: @escaping (CheckFinding) -> Void = { _ in }
    ) throws(ImageError) {
        self.header = header
        self.keepsUnreferenced = keepsUnreferenced
        var walk = try ReferenceWalk(
            device, header: header, tableRead: tableRead, report: report)
        try walk.run(countingRefcounts: false)
        counts = walk.counts
        pastTheEnd = walk.pastTheEnd.merged
        let cluster = header.clusterByteCount
        fileClusterCount = (walk.fileByteCount &+ cluster &- 1) / cluster

        let l1ByteCount = UInt64(header.l1EntryCount) &* 8
        let l1ClusterCount = (l1ByteCount &+ cluster &- 1) / cluster
        let firstOfL1 = header.l1Offset / cluster
        movesL1 = (firstOfL1..<firstOfL1 &+ l1ClusterCount).contains(where: counts.isShared)
        let movedL1 = movesL1 ? l1ClusterCount : 0
        formerL1 = firstOfL1..<firstOfL1 &+ movedL1

        let place = try Place(
            walk, pastTheEnd, fileClusterCount: fileClusterCount, l1ClusterCount: movedL1,
            isWholeFileCounted: keepsUnreferenced)
        own = place.start..<place.end
        l1Offset = movesL1 ? place.start &* cluster : header.l1Offset
        tableClusterCount = place.tableClusterCount
        tableOffset = (place.start &+ movedL1) &* cluster
        headerSector = try Header.read(512, at: 0, of: device)

        let format = RefcountFormat(order: header.refcountOrder)
        let blockBits = header.refcountBlockBits
        let firstBlock = tableOffset &+ tableClusterCount &* cluster
        var table = [UInt8](repeating: 0, count: Int(tableClusterCount &* cluster))
        for (index, block) in place.blocks.enumerated() {
            let offset = firstBlock &+ UInt64(index) &* cluster
            table.storeBigEndian(offset, at: Int(block) * 8)
            var bytes = [UInt8](repeating: 0, count: Int(cluster))
            bytes.withUnsafeMutableBytes { bytes in
                for index in 0..<format.entryCount(inBytes: bytes.count) {
                    let count = self.count(of: block << blockBits &+ UInt64(index))
                    if count > 0 { format.store(min(count, format.maximum), at: index, in: bytes) }
                }
            }
            newStructures.append(RepairPlan.Edit(offset: offset, bytes: bytes))
        }
        newStructures.append(RepairPlan.Edit(offset: tableOffset, bytes: table))
        if movesL1 {
            let l1 = try Header.read(Int(l1ByteCount), at: header.l1Offset, of: device)
            newStructures.append(RepairPlan.Edit(offset: l1Offset, bytes: l1))
        }
    }

    /// The count that a cluster gets.
    func count(of cluster: UInt64) -> UInt64 {
        if own.contains(cluster) { return 1 }
        let isLess = formerL1.contains(cluster) && !counts.hasMoreThanCounted(cluster)
        let found = counts.count(of: cluster) &- (isLess ? 1 : 0)
        if found > 0 { return found }
        return cluster < fileClusterCount
            ? keepsUnreferenced ? 1 : 0 : pastTheEnd.haveCluster(cluster) ? 1 : 0
    }

    /// The counts of everything but the new structures.
    var allCounts: ReferenceCounts { counts }

    /// Edits of the L1 table, at its new place if it has one.
    func moved(_ l1Edits: [RepairPlan.Edit]) -> [RepairPlan.Edit] {
        l1Edits.map {
            RepairPlan.Edit(offset: $0.offset &- header.l1Offset &+ l1Offset, bytes: $0.bytes)
        }
    }

    /// The one write that makes the new structures the image's.
    var headerSwitch: RepairPlan.Edit {
        var sector = headerSector
        sector.storeBigEndian(l1Offset, at: HeaderField.l1Offset)
        sector.storeBigEndian(tableOffset, at: HeaderField.refcountTableOffset)
        sector.storeBigEndian(
            UInt32(clamping: tableClusterCount), at: HeaderField.refcountTableClusterCount)
        return RepairPlan.Edit(offset: 0, bytes: sector)
    }
}

/// The clusters that new refcount structures get: behind everything that the file has, and where
/// nothing refers to, past the end of the file as it is.
private struct Place {
    private(set) var start: UInt64
    /// Behind the L1 table's copy, the refcount table and its blocks.
    private(set) var end: UInt64
    private(set) var tableClusterCount: UInt64 = 0
    /// The places in the table of the blocks that there are, ascending.
    private(set) var blocks: [UInt64] = []

    /// Bytes of all blocks up to one that is made for what lies past the end of the file.
    private static let mostBlockBytesPastTheEnd: UInt64 = 64 << 20

    /// - Parameter isWholeFileCounted: Whether clusters without a reference have a count too.
    /// - Throws: `.corrupt` where the table would be longer than it may be.
    init(
        _ walk: borrowing ReferenceWalk, _ pastTheEnd: [Range<UInt64>], fileClusterCount: UInt64,
        l1ClusterCount: UInt64, isWholeFileCounted: Bool
    ) throws(ImageError) {
        let header = walk.header
        let blockBits = header.refcountBlockBits
        var counted: Set<UInt64> = []
        for range in walk.counts.touchedRanges {
            counted.formUnion(range.lowerBound >> blockBits...(range.upperBound - 1) >> blockBits)
        }
        if isWholeFileCounted { counted.formUnion(0...fileClusterCount >> blockBits) }
        let first = walk.clusterEnd
        for range in pastTheEnd {
            let blocks = range.lowerBound >> blockBits...(range.upperBound - 1) >> blockBits
            // What entries that make no sense refer to may lie anywhere.
            let end = blocks.upperBound &* header.clusterByteCount
            if end < Self.mostBlockBytesPastTheEnd { counted.formUnion(blocks) }
        }
        var room: UInt64 = 0
        while true {
            var start = first
            // The guest reads zeros there, and still shall.
            for range in pastTheEnd where range.lowerBound < start &+ room {
                start = max(start, range.upperBound)
            }
            self = try Place(
                from: start, l1ClusterCount: l1ClusterCount, counted, header,
                name: walk.device.name)
            if end &- start <= room { return }
            room = end &- start
        }
    }

    private init(
        from start: UInt64, l1ClusterCount: UInt64, _ counted: Set<UInt64>, _ header: Header,
        name: String
    ) throws(ImageError) {
        let blockBits = header.refcountBlockBits
        let cluster = header.clusterByteCount
        self.start = start
        end = start &+ l1ClusterCount
        while true {
            guard end >> blockBits < Limits.refcountTableByteCount / 8 else {
                throw ImageError(
                    .corrupt("its refcounts cannot be rebuilt: the table would be too long"),
                    file: name)
            }
            // What is new is counted too.
            blocks = counted.union(start >> blockBits...end >> blockBits).sorted()
            let entryCount = (blocks.last ?? 0) &+ 1
            tableClusterCount = (entryCount &* 8 &+ cluster &- 1) / cluster
            let needed = start &+ l1ClusterCount &+ tableClusterCount &+ UInt64(blocks.count)
            if needed <= end { return }
            end = needed
        }
    }
}
