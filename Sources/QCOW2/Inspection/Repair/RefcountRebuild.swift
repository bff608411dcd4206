/// A refcount table and blocks made from nothing but the references, behind the end of the file,
/// with a copy of the L1 table where something else lies in the old one.
struct RefcountRebuild {
    private(set) var newStructures: [RepairPlan.Edit] = []
    private let header: Header
    private let counts: ReferenceCounts
    let tableOffset: UInt64
    let tableClusterCount: UInt64
    let l1Offset: UInt64
    private let keepsUnreferenced: Bool
    private let fileClusterCount: UInt64
    private let own: Range<UInt64>
    /// The clusters of an L1 table that is left behind.
    private let formerL1: Range<UInt64>
    private var headerSector: [UInt8]

    var description: String {
        "count all references anew in blocks at \(hex(tableOffset)) and behind"
            + (l1Offset == header.l1Offset ? "" : ", and copy the L1 table to \(hex(l1Offset))")
    }

    /// - Parameters:
    ///   - header: What the image is counted by; its refcount width is that of the new blocks.
    ///   - keepsUnreferenced: Whether every cluster of the file counts as used, because
    ///     references may be hidden.
    ///   - tableRead: Called for each L2 table.
    ///   - report: Gets what is met on the way.
    init(
        _ device: any BlockDevice, header: Header, keepsUnreferenced: Bool = false,
        tableRead: @escaping () -> Void = {},
        report: @escaping (CheckFinding) -> Void = { _ in }
    ) throws(ImageError) {
        self.header = header
        self.keepsUnreferenced = keepsUnreferenced
        var walk = try ReferenceWalk(
            device, header: header, tableRead: tableRead, report: report)
        try walk.run(countingRefcounts: false)
        counts = walk.counts
        let cluster = header.clusterByteCount
        fileClusterCount = (walk.fileByteCount &+ cluster &- 1) / cluster
        let start = max(fileClusterCount, (counts.highestCluster ?? 0) &+ 1)

        let l1ByteCount = UInt64(header.l1EntryCount) &* 8
        let l1ClusterCount = (l1ByteCount &+ cluster &- 1) / cluster
        let firstOfL1 = header.l1Offset / cluster
        let isL1Shared = (firstOfL1..<firstOfL1 &+ l1ClusterCount).contains {
            walk.counts.count(of: $0) > 1
        }
        let movedL1 = isL1Shared ? l1ClusterCount : 0
        l1Offset = isL1Shared ? start &* cluster : header.l1Offset
        formerL1 = firstOfL1..<firstOfL1 &+ movedL1

        // Clusters for the blocks and the table, which are counted themselves.
        let format = RefcountFormat(order: header.refcountOrder)
        let blockBits = UInt64(header.clusterBits) &+ 3 &- UInt64(header.refcountOrder)
        var blocks: [UInt64] = []
        var end = start &+ movedL1
        while true {
            var wanted = Set((start >> blockBits)...(end >> blockBits))
            for range in counts.touchedRanges {
                wanted.formUnion(
                    range.lowerBound >> blockBits...(range.upperBound - 1) >> blockBits)
            }
            if keepsUnreferenced { wanted.formUnion(0...start >> blockBits) }
            blocks = wanted.sorted()
            let entries = (blocks.last ?? 0) &+ 1
            let table = (entries &* 8 &+ cluster &- 1) / cluster
            let needed = start &+ movedL1 &+ table &+ UInt64(blocks.count)
            if needed <= end { break }
            end = needed
        }
        own = start..<end
        tableClusterCount = (((blocks.last ?? 0) &+ 1) &* 8 &+ cluster &- 1) / cluster
        guard tableClusterCount &* cluster <= Limits.refcountTableByteCount else {
            throw ImageError(
                .corrupt("its refcounts cannot be rebuilt: the table would be too long"),
                file: device.name)
        }
        tableOffset = (start &+ movedL1) &* cluster
        headerSector = try Header.read(512, at: 0, of: device)

        let firstBlock = tableOffset &+ tableClusterCount &* cluster
        var table = [UInt8](repeating: 0, count: Int(tableClusterCount &* cluster))
        for (index, block) in blocks.enumerated() {
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
        if isL1Shared {
            let l1 = try Header.read(Int(l1ByteCount), at: header.l1Offset, of: device)
            newStructures.append(RepairPlan.Edit(offset: l1Offset, bytes: l1))
        }
    }

    /// The count that a cluster gets.
    func count(of cluster: UInt64) -> UInt64 {
        if own.contains(cluster) { return 1 }
        let found = counts.count(of: cluster) &- (formerL1.contains(cluster) ? 1 : 0)
        return found == 0 && keepsUnreferenced && cluster < fileClusterCount ? 1 : found
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
