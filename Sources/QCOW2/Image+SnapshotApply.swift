internal import Synchronization

/// Going back to a snapshot.
extension Image {
    /// Makes the disk what it was when the snapshot `word`, an identifier or a name, was made, its
    /// size included; what the disk holds now is lost, and the snapshot stays.
    ///
    /// VM state stays with the snapshot.
    /// - Throws: `.invalidArgument` where there is no such snapshot or refcounts are too narrow,
    ///   `.malformed` or `.corrupt` where its tables make no sense; `.system`.
    public func applySnapshot(_ word: String) throws(ImageError) {
        // Before anything is written.
        guard try snapshots().find(word) != nil else { throw noSnapshot(word) }
        try changeSnapshots { writing throws(ImageError) in
            guard let snapshot = try snapshots().find(word) else { throw noSnapshot(word) }
            let byteCount = try diskByteCount(of: snapshot)
            var entries = try TableTree.l1Entries(
                of: snapshot, in: top.file, header: header,
                limit: header.l1EntryCountNeeded(for: byteCount & ~511))
            // The table never gets shorter: a request under way may ask for an old offset.
            entries += repeatElement(
                L1Entry(bits: 0), count: max(neededEntryCount(byteCount) - entries.count, 0))
            try apply(entries, byteCount: byteCount, writing)
        }
    }

    private func neededEntryCount(_ byteCount: UInt64) -> Int {
        max(Int(header.l1EntryCountNeeded(for: byteCount)), map.l1EntryCount, 1)
    }

    private func apply(
        _ entries: [L1Entry], byteCount: UInt64, _ writing: Writing
    ) throws(ImageError) {
        try checkBitmaps(forSize: byteCount & ~511, writing)
        let tree = TableTree(entries, in: top.file, header: header)
        try tree.forEachReference(.refused) { runs throws(ImageError) in
            try writing.allocator.checkRaising(runs)
        }
        guard let room = try takeRoom(entries.count * 8, writing) else { return }
        writing.guarded.remove(room)
        for cluster in room.first..<room.end { writing.guarded.addTable(cluster) }
        try writing.beginChange(header)
        try raise(tree, room, writing)
        try tree.clearCopied()
        let old = try stopAndSwitch(to: entries, at: room, byteCount: byteCount, writing)
        // Nothing leads to the old tables any more.
        try drop(old, writing)
        for _ in 0..<2 { try writing.commit.tidy() }
        try writing.endChange(header)
        countAllocationAgain()
    }

    /// Adds a reference to everything in `tree`, or to nothing.
    private func raise(
        _ tree: TableTree, _ room: ClusterRun, _ writing: Writing
    ) throws(ImageError) {
        var done = 0
        do throws(ImageError) {
            try tree.forEachReference(.refused) { runs throws(ImageError) in
                try writing.allocator.raise(runs)
                done += 1
            }
        } catch {
            // The walk is the same each time.
            try tree.forEachReference(.refused) { runs throws(ImageError) in
                if done > 0 { map.drop(runs) }
                done -= 1
            }
            try writing.allocator.release(room)
            try writing.endChange(header)
            throw error
        }
        try writing.commit.now()
    }

    /// One moment changes the disk's tables and its size; returns the tables that it had.
    private func stopAndSwitch(
        to entries: [L1Entry], at room: ClusterRun, byteCount: UInt64, _ writing: Writing
    ) throws(ImageError) -> TableTree {
        ranges.lockEverything()
        defer { ranges.unlockEverything() }
        // Afterwards the file has the old tables as they are, and nothing is dirty.
        try writing.commit.now()
        let old = activeTree
        try writing.commit.excluding { () throws(ImageError) in
            try map.replaceL1Table(by: entries, at: room.first &<< map.clusterBits)
            writing.header.change { $0.storeBigEndian(byteCount, at: HeaderField.size) }
        }
        writing.bitmaps.recordSize(from: size, to: byteCount & ~511)
        writing.bitmaps.recordEverything(diskByteCount: byteCount & ~511)
        currentSize.store(byteCount & ~511, ordering: .releasing)
        allocation.restart()
        try writing.commit.now()
        return old
    }
}
