internal import Logging

/// Counting the disk's clusters once more for a snapshot, table by table, beside clients.
extension Image {
    /// Raises the counts of everything that the active tables refer to, and clears COPIED there.
    func capture(_ writing: Writing) throws(ImageError) {
        var index = 0
        while index < map.l1EntryCount {
            index = try captureTable(from: index, writing)
            try captureEntries(before: index, writing)
        }
    }

    /// Counts the first L2 table from L1 entry `index` on; returns the index behind it.
    private func captureTable(from index: Int, _ writing: Writing) throws(ImageError) -> Int {
        // Nobody makes or replaces a table meanwhile.
        try writing.tables.withLock { _ throws(ImageError) in
            let index = map.nextTable(from: index)
            guard index < map.l1EntryCount else {
                coverMissing(upTo: map.l1EntryCount, writing)
                return map.l1EntryCount
            }
            coverMissing(upTo: index, writing)
            var table = map.l1Entry(index)
            guard table.offset & map.clusterMask == 0 else {
                throw top.fault(
                    Extent(.corrupt, host: table.bits, byteCount: 0),
                    at: UInt64(index) &<< map.coverageBits)
            }
            if table.isCopied {
                // Judged while its count still is 1.
                try makeTableWritableAlone(at: UInt64(index) &<< map.coverageBits, writing)
                table = map.l1Entry(index)
            }
            try writing.commit.excluding { () throws(ImageError) in
                try writing.allocator.raise([
                    ClusterRun(first: table.offset &>> map.clusterBits, count: 1)
                ])
                writing.capture.cover(tablesUpTo: index + 1)
            }
            return index + 1
        }
    }

    /// L1 entries without a table have nothing to count.
    private func coverMissing(upTo index: Int, _ writing: Writing) {
        map.whileLocked {
            writing.capture.cover(tablesUpTo: index)
            writing.capture.cover(upTo: UInt64(index) &* map.tableClusterCount)
        }
    }

    /// Counts what the entries refer to, up to the end of the table before L1 entry `index`.
    private func captureEntries(before index: Int, _ writing: Writing) throws(ImageError) {
        let end = UInt64(index) &* map.tableClusterCount
        while writing.capture.coveredClusterCount < end {
            if try captureSlice(writing) {
                if map.isHalfFull { try writing.commit.now() }
            } else {
                try writing.commit.now()
            }
        }
    }

    /// Counts what the next slice refers to; false where the cache has no room for it now.
    private func captureSlice(_ writing: Writing) throws(ImageError) -> Bool {
        let cluster = writing.capture.coveredClusterCount
        let bits = map.clusterBits
        return try writing.commit.excluding { () throws(ImageError) in
            guard let entries = try map.entries(ofSliceAt: cluster) else { return false }
            var runs: [ClusterRun] = []
            for (index, entry) in entries.enumerated() {
                guard entry.hasCountableReferences(clusterBits: bits) else {
                    let guest = (cluster &+ UInt64(index)) &<< bits
                    throw top.fault(
                        Extent(.corrupt, host: entry.bits, byteCount: 0), at: guest)
                }
                runs.append(references: entry, clusterBits: bits)
            }
            try writing.allocator.raise(runs)
            guard try cover(entries, ofSliceAt: cluster, writing) else {
                map.drop(runs)
                return false
            }
            try followClientsNow(writing)
            return true
        }
    }

    /// Moves the boundary over a slice whose `entries` were counted, and clears COPIED there.
    private func cover(
        _ entries: [L2Entry], ofSliceAt cluster: UInt64, _ writing: Writing
    ) throws(ImageError) -> Bool {
        let end = cluster &+ UInt64(entries.count)
        return try map.update(cluster, count: entries.count) { index, old in
            // In one step with the look at the entries: later changes are followed.
            writing.capture.cover(upTo: end)
            guard old == entries[index] else {
                return writing.capture.follow(entries[index], old, clusterBits: map.clusterBits)
            }
            return old.isCompressed ? old : old.withoutCopied
        } == entries.count
    }

    /// Counts for the snapshot what clients changed behind the boundary.
    func followClients(_ writing: Writing) throws(ImageError) {
        try writing.commit.excluding { () throws(ImageError) in try followClientsNow(writing) }
    }

    /// No commit runs: a cluster that is on its way to be free is not taken for one in use.
    private func followClientsNow(_ writing: Writing) throws(ImageError) {
        let changes = writing.capture.takeChanges()
        guard !changes.gained.isEmpty || !changes.lost.isEmpty else { return }
        do throws(ImageError) {
            try writing.allocator.raise(changes.gained, mayBeFree: true)
        } catch {
            writing.capture.putBack(changes)
            throw error
        }
        map.drop(changes.lost)
    }

    // MARK: Giving up

    /// Takes back what was counted for a snapshot that does not come about, and its clusters.
    ///
    /// Where even that fails, the counts stay too high until `close()`: clusters are lost
    /// meanwhile, nothing else, and the dirty bit stays set.
    func giveUp(_ rooms: [ClusterRun?], _ writing: Writing) throws(ImageError) {
        ranges.lockEverything()
        defer {
            writing.capture.end()
            ranges.unlockEverything()
        }
        for room in rooms { try giveBack(room, writing) }
        try followClients(writing)
        try dropCaptured(writing)
        if writing.capture.coveredTableCount > 0 { try restoreCopied(writing) }
        try writing.endChange(header)
    }

    private func dropCaptured(_ writing: Writing) throws(ImageError) {
        var cluster: UInt64 = 0
        while cluster < writing.capture.coveredClusterCount {
            let index = Int(cluster / map.tableClusterCount)
            if map.l1Entry(index).offset == 0 {
                cluster = UInt64(map.nextTable(from: index)) &* map.tableClusterCount
                continue
            }
            if let entries = try map.entries(ofSliceAt: cluster) {
                var runs: [ClusterRun] = []
                for entry in entries {
                    runs.append(references: entry, clusterBits: map.clusterBits)
                }
                map.drop(runs)
                cluster &+= map.sliceClusterCount
            }
            try writing.commit.now()
        }
        for index in 0..<writing.capture.coveredTableCount where map.l1Entry(index).offset != 0 {
            let table = map.l1Entry(index).offset &>> map.clusterBits
            map.drop([ClusterRun(first: table, count: 1)])
        }
    }
}
