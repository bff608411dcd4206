/// Where an image's tables lie, and which of them say nothing.
struct CompactionSurvey {
    /// A table of one cluster or more that stay together.
    struct Table {
        enum Kind { case l1, snapshots, bitmapDirectory, bitmap, refcounts }

        var kind: Kind
        var offset: UInt64
        var byteCount: UInt64
    }

    /// A compressed cluster's stream.
    struct Stream {
        var offset: UInt64
        var byteCount: UInt64
        /// Entries that lead there.
        var count: UInt64

        var end: UInt64 { offset &+ byteCount }
    }

    let header: Header
    let counts: ReferenceCounts
    let stored: StoredRefcounts
    private(set) var snapshots: [Snapshot] = []
    private(set) var bitmaps: [BitmapEntry] = []
    /// All but L2 tables and refcount blocks.
    private(set) var tables: [Table] = []
    /// The host offsets of L2 tables, with the number of L1 entries that lead to each.
    private(set) var l2Tables: [UInt64: UInt64] = [:]
    /// L2 tables among them without which everything reads the same.
    private(set) var emptyTables: Set<UInt64> = []
    /// The clusters of refcount blocks by their numbers, ascending.
    private(set) var blocks: [(index: UInt64, cluster: UInt64)] = []
    private(set) var bitmapClusters: Set<UInt64> = []
    private(set) var hasStreams = false

    private let walk: ReferenceWalk
    private let file: HostFile

    /// - Throws: `.corrupt` where a table is something else too: it cannot be changed then.
    init(_ examination: Examination, of file: HostFile) throws(ImageError) {
        try self.init(examination.walk, examination.stored, of: file)
        if let cluster = overlaps().first {
            throw file.corrupt(
                "the table at \(hex(cluster &<< clusterBits)) is used as something else, too: "
                    + "convert the image to a new one")
        }
    }

    /// - Parameter walk: One that has counted everything.
    init(
        _ walk: ReferenceWalk, _ stored: StoredRefcounts, of file: HostFile
    ) throws(ImageError) {
        header = walk.header
        self.walk = walk
        counts = walk.counts
        self.stored = stored
        self.file = file
        try findTables()
        try findBlocks()
        try findL2Tables()
    }

    var clusterBits: UInt64 { UInt64(header.clusterBits) }

    /// The clusters of a table.
    func run(of table: Table) -> ClusterRun {
        FixedTables.clusters(of: table.offset, table.byteCount, clusterBits: clusterBits)
            ?? ClusterRun(first: 0, count: 0)
    }

    /// Clusters that stay where they are: the header, and the key material.
    var fixed: [ClusterRun] {
        var runs = [ClusterRun(first: 0, count: 1)]
        if let area = header.encryption {
            let run = FixedTables.clusters(
                of: area.offset, area.byteCount, clusterBits: clusterBits)
            if let run { runs.append(run) }
        }
        return runs
    }

    /// Clusters that hold no guest data.
    var metadata: Set<UInt64> {
        var found = bitmapClusters
        for run in tables.map(run) + fixed { found.formUnion(run.first..<run.end) }
        for table in l2Tables.keys { found.insert(table &>> clusterBits) }
        for block in blocks { found.insert(block.cluster) }
        return found
    }

    // MARK: Finding

    private mutating func findTables() throws(ImageError) {
        let (snapshots, byteCount) = try header.readSnapshots(from: file.device)
        self.snapshots = snapshots
        bitmaps = try header.readBitmaps(from: file.device)
        add(.l1, header.l1Offset, UInt64(header.l1EntryCount) &* 8)
        for snapshot in snapshots {
            add(.l1, snapshot.l1Offset, UInt64(snapshot.l1EntryCount) &* 8)
        }
        add(.snapshots, header.snapshotsOffset, UInt64(byteCount))
        if let directory = header.bitmaps, !bitmaps.isEmpty {
            add(.bitmapDirectory, directory.directoryOffset, directory.directoryByteCount)
        }
        for bitmap in bitmaps {
            add(.bitmap, bitmap.tableOffset, UInt64(bitmap.tableEntryCount) &* 8)
        }
        add(
            .refcounts, header.refcountTableOffset,
            UInt64(header.refcountTableClusterCount) &* header.clusterByteCount)
        for table in tables where table.kind == .bitmap {
            var clusters: [UInt64] = []
            try walk.forEachEntry(at: table.offset, entryCount: table.byteCount / 8) { _, bits in
                let offset = BitmapTableEntry(bits: bits).offset
                if offset != 0 { clusters.append(offset &>> clusterBits) }
            }
            bitmapClusters.formUnion(clusters)
        }
    }

    private mutating func add(_ kind: Table.Kind, _ offset: UInt64, _ byteCount: UInt64) {
        guard byteCount > 0 else { return }
        tables.append(Table(kind: kind, offset: offset, byteCount: byteCount))
    }

    private mutating func findBlocks() throws(ImageError) {
        for index in 0..<stored.blockCount {
            let offset = stored.blockOffset(index)
            if offset != 0 { blocks.append((index, offset &>> clusterBits)) }
        }
    }

    private mutating func findL2Tables() throws(ImageError) {
        for table in tables where table.kind == .l1 {
            var found: [UInt64] = []
            try walk.forEachEntry(at: table.offset, entryCount: table.byteCount / 8) { _, bits in
                found.append(L1Entry(bits: bits).offset)
            }
            for offset in found where offset != 0 { l2Tables[offset, default: 0] &+= 1 }
        }
        for offset in l2Tables.keys {
            let entries = try walk.l2Entries(at: offset)
            if entries.allSatisfy(saysNothing) { emptyTables.insert(offset) }
            if !hasStreams { hasStreams = entries.contains { $0.isCompressed } }
        }
    }

    /// Whether the entry reads as no entry at all does.
    private func saysNothing(_ entry: L2Entry) -> Bool {
        if entry.bits & ~L2Entry.zero != 0 || header.backingFile != nil { return false }
        return header.l2EntryByteCount == 8
            ? entry.bits == L2Entry.zero && header.version >= 3
            : entry.bits == 0 && entry.subclusters.allocated == 0
    }

    /// The streams that touch clusters from `first` on, ascending.
    func streams(from first: UInt64) throws(ImageError) -> [Stream] {
        guard hasStreams else { return [] }
        var found: [Stream] = []
        for (table, count) in l2Tables {
            for entry in try walk.l2Entries(at: table) where entry.isCompressed {
                let place = CompressedDescriptor(entry, clusterBits: header.clusterBits)
                let stream = Stream(
                    offset: place.offset, byteCount: UInt64(place.byteCount), count: count)
                if (stream.end &- 1) &>> clusterBits >= first { found.append(stream) }
            }
        }
        found.sort { ($0.offset, $0.byteCount) < ($1.offset, $1.byteCount) }
        return try merged(found)
    }

    private func merged(_ streams: [Stream]) throws(ImageError) -> [Stream] {
        var merged: [Stream] = []
        for stream in streams {
            guard let last = merged.last, last.offset == stream.offset else {
                merged.append(stream)
                continue
            }
            guard last.byteCount == stream.byteCount else {
                throw file.corrupt(
                    "entries do not agree how long the compressed cluster at "
                        + "\(hex(stream.offset)) is")
            }
            merged[merged.count - 1].count &+= stream.count
        }
        return merged
    }

    // MARK: Judging

    /// Clusters of tables that are something else too, ascending.
    func overlaps() -> [UInt64] {
        var found: Set<UInt64> = []
        func check(_ run: ClusterRun, _ count: UInt64 = 1) {
            for cluster in run.first..<run.end where counts.count(of: cluster) > count {
                found.insert(cluster)
            }
        }
        for table in tables { check(run(of: table)) }
        for run in fixed { check(run) }
        for (offset, count) in l2Tables {
            check(ClusterRun(first: offset &>> clusterBits, count: 1), count)
        }
        for block in blocks { check(ClusterRun(first: block.cluster, count: 1)) }
        for cluster in bitmapClusters { check(ClusterRun(first: cluster, count: 1)) }
        return found.sorted()
    }

    /// A cluster of streams that is something else too cannot be moved stream by stream.
    func checkStreams(_ streams: [Stream], from first: UInt64) throws(ImageError) {
        var found: [UInt64: UInt64] = [:]
        for stream in streams {
            for cluster in clusters(of: stream) where cluster >= first {
                found[cluster, default: 0] &+= stream.count
            }
        }
        for (cluster, count) in found where counts.count(of: cluster) != count {
            throw file.corrupt(
                "the compressed clusters at \(hex(cluster &<< clusterBits)) are used as "
                    + "something else, too: convert the image to a new one")
        }
    }

    func clusters(of stream: Stream) -> ClosedRange<UInt64> {
        stream.offset &>> clusterBits...(stream.end &- 1) &>> clusterBits
    }
}
