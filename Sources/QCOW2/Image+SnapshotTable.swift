internal import Logging
internal import Synchronization

/// What every change of the snapshots needs.
extension Image {
    /// Runs `body` alone among everything that changes the image's structure.
    func changeSnapshots<Result>(
        _ body: (Writing) throws(ImageError) -> Result
    ) throws(ImageError) -> Result {
        let writing = try writer()
        guard !header.incompatibleFeatures.contains(.externalDataFile) else {
            throw ImageError(
                .invalidArgument("an image with an external data file has no internal snapshots"),
                file: top.file.name)
        }
        try begin(writing)
        return try writing.structure.withLock { _ throws(ImageError) in try body(writing) }
    }

    /// Takes clusters for a table of `byteCount` bytes; nil where it has none.
    func takeRoom(_ byteCount: Int, _ writing: Writing) throws(ImageError) -> ClusterRun? {
        guard byteCount > 0 else { return nil }
        let count = (UInt64(byteCount) &+ map.clusterMask) &>> map.clusterBits
        let run = try allocate(Int(count), exactly: true, writing)
        writing.guarded.add(run)
        return run
    }

    /// Gives back clusters that nothing refers to.
    func giveBack(_ run: ClusterRun?, _ writing: Writing) throws(ImageError) {
        guard let run else { return }
        writing.guarded.remove(run)
        try writing.allocator.release(run)
    }

    // MARK: The snapshot table

    /// Writes a table of `snapshots` to `room`, to which nothing refers yet.
    func writeTable(
        of snapshots: [Snapshot], to room: ClusterRun?, _ writing: Writing
    ) throws(ImageError) {
        guard let room else { return }
        let bytes = Snapshot.encodeTable(snapshots)
        let offset = room.first &<< map.clusterBits
        try writing.file.write(bytes, at: offset)
        // The rest of the cluster is zeros, so that nothing old is taken for an entry.
        try writing.file.writeZeroes(
            offset &+ UInt64(bytes.count)..<offset &+ room.count &<< map.clusterBits)
    }

    /// Makes the table at `room`, which is durable, the image's, and returns when that is durable.
    func switchTable(
        to snapshots: [Snapshot], at room: ClusterRun?, _ writing: Writing
    ) throws(ImageError) {
        let offset = (room?.first ?? 0) &<< map.clusterBits
        let old = try withSnapshotList { list throws(ImageError) -> ClusterRun? in
            let old = FixedTables.clusters(
                of: list.tableOffset, UInt64(list.snapshots.tableByteCount),
                clusterBits: map.clusterBits)
            list.snapshots = snapshots
            list.tableOffset = offset
            return old
        }
        try writing.commit.excluding { () throws(ImageError) in
            writing.header.change {
                $0.storeBigEndian(UInt32(snapshots.count), at: HeaderField.snapshotCount)
                $0.storeBigEndian(offset, at: HeaderField.snapshotsOffset)
            }
            if let old {
                writing.guarded.remove(old)
                map.drop([old])
            }
        }
        try writing.commit.now()
    }

    /// Throws where a table of `snapshots` would be more than anybody reads.
    func checkTable(of snapshots: [Snapshot]) throws(ImageError) {
        guard UInt64(snapshots.count) <= Limits.snapshotCount,
            UInt64(snapshots.tableByteCount) <= Limits.snapshotTableByteCount
        else {
            throw ImageError(
                .invalidArgument(
                    "the snapshot table is full: \(Limits.snapshotCount) snapshots, or "
                        + "\(Limits.snapshotTableByteCount) bytes of them"), file: top.file.name)
        }
    }

    // MARK: Trees

    /// Drops every reference of a tree that nothing leads to any more, some at a time.
    func drop(_ tree: TableTree, _ writing: Writing) throws(ImageError) {
        try tree.forEachReference(.ignored) { runs throws(ImageError) in
            map.drop(runs)
            try writing.commit.relieve()
        }
    }

    /// Sets COPIED in the active tables where, and only where, the target has one reference.
    ///
    /// Clients may go on meanwhile: counts fall only where their references go, and rise for
    /// snapshots only.
    func restoreCopied(_ writing: Writing) throws(ImageError) {
        // Lower counts come first: a flag must never be durable before them.
        for _ in 0..<2 { try writing.commit.tidy() }
        var index = map.nextTable(from: 0)
        while index < map.l1EntryCount {
            try restoreCopied(ofTable: index, writing)
            index = map.nextTable(from: index + 1)
        }
        try writing.commit.tidy()
    }

    private func restoreCopied(ofTable index: Int, _ writing: Writing) throws(ImageError) {
        guard try markAlone(table: index, writing) else { return }
        var cluster = UInt64(index) &* map.tableClusterCount
        let end = cluster &+ map.tableClusterCount
        while cluster < end {
            let part = cluster..<min(cluster &+ Self.slicesAtOnce &* map.sliceClusterCount, end)
            cluster = try restoreCopied(of: part, writing)
            if cluster < part.upperBound || map.isHalfFull { try writing.commit.now() }
        }
    }

    /// How many slices of an L2 table get their flags while commits wait: more, and clients that
    /// sync notice; fewer, and these waits add up.
    private static var slicesAtOnce: UInt64 { 16 }

    /// Marks a table that nobody shares; nobody replaces it by a copy from here on, so that what
    /// its entries get is in the table that stays.
    private func markAlone(table index: Int, _ writing: Writing) throws(ImageError) -> Bool {
        try writing.tables.withLock { _ throws(ImageError) in
            let offset = map.l1Entry(index).offset
            guard offset & map.clusterMask == 0,
                try writing.allocator.count(of: offset &>> map.clusterBits) == 1
            else { return false }
            map.setCopied(true, ofTable: index)
            return true
        }
    }

    /// Returns how far it came: not to the end where the cache has no room before the next commit.
    private func restoreCopied(
        of clusters: Range<UInt64>, _ writing: Writing
    ) throws(ImageError) -> UInt64 {
        // No commit runs: a cluster that an entry has is not freed, and given to the same entry
        // again, between the look at its count and the change.
        try writing.commit.excluding { () throws(ImageError) in
            var cluster = clusters.lowerBound
            while cluster < clusters.upperBound, try restoreCopied(ofSliceAt: cluster, writing) {
                cluster &+= map.sliceClusterCount
            }
            return cluster
        }
    }

    /// The same for a slice, while no commit runs; false where the cache has no room.
    private func restoreCopied(
        ofSliceAt cluster: UInt64, _ writing: Writing
    ) throws(ImageError) -> Bool {
        guard let entries = try map.entries(ofSliceAt: cluster) else { return false }
        let isAlone = try haveClustersAlone(entries, writing)
        let isRight = zip(entries, isAlone).allSatisfy { $1 == nil || $0.isCopied == $1 }
        if isRight { return true }
        let done = try map.update(cluster, count: entries.count) { index, old in
            // A client may have changed it; its new cluster is marked as it should be.
            guard let isAlone = isAlone[index], !old.isCompressed,
                old.offset == entries[index].offset
            else { return old }
            return old.withCopied(isAlone)
        }
        return done == entries.count
    }

    /// For each entry whether its cluster has one reference only; nil where it has no cluster, or
    /// none that is whole.
    private func haveClustersAlone(
        _ entries: [L2Entry], _ writing: Writing
    ) throws(ImageError) -> [Bool?] {
        let targets = entries.indices.filter {
            !entries[$0].isCompressed && entries[$0].offset != 0
                && entries[$0].offset & map.clusterMask == 0
        }
        let isAlone = try writing.allocator.haveOneReference(
            targets.map { entries[$0].offset &>> map.clusterBits })
        var answers = [Bool?](repeating: nil, count: entries.count)
        for (target, isAlone) in zip(targets, isAlone) { answers[target] = isAlone }
        return answers
    }
}

extension Image.Writing {
    /// A change begins, during which counts may be too high: the dirty bit (version 3) says so,
    /// durably, to whoever opens the image after a crash.  Where the change fails before its end,
    /// `close()` puts the counts right.
    func beginChange(_ atOpen: Header) throws(ImageError) {
        unfinishedChangeCount.add(1, ordering: .releasing)
        try setDirty(true, atOpen)
    }

    /// The change is done, or was taken back: counts are what they should be.
    func endChange(_ atOpen: Header) throws(ImageError) {
        let others = unfinishedChangeCount.subtract(1, ordering: .releasing).newValue
        if others == 0 { try setDirty(false, atOpen) }
    }

    private func setDirty(_ isDirty: Bool, _ atOpen: Header) throws(ImageError) {
        guard atOpen.version == 3 else { return }
        let other = atOpen.incompatibleFeatures.subtracting(.dirty)
        let features = isDirty ? other.union(.dirty) : other
        header.change {
            $0.storeBigEndian(features.rawValue, at: HeaderField.incompatibleFeatures)
        }
        try commit.now()
    }
}
