/// Deleting a snapshot.
extension Image {
    /// Deletes the snapshot `word`, a name or an identifier; what only it kept is free afterwards.
    /// - Throws: `.invalidArgument` where there is no such snapshot, `.snapshotInUse`;
    ///   `.malformed` where its L1 table cannot be; `.system`.
    public func deleteSnapshot(_ word: String) throws(ImageError) {
        // Before anything is written.
        guard try snapshots().findForDeletion(word) != nil else { throw noSnapshot(word) }
        try changeSnapshots { writing throws(ImageError) in
            let snapshot = try claimForDeletion(word)
            defer { release(snapshot) }
            let entries = try TableTree.l1Entries(of: snapshot, in: top.file, header: header)
            try delete(snapshot, TableTree(entries, in: top.file, header: header), writing)
        }
    }

    /// From here on nobody opens the snapshot.
    private func claimForDeletion(_ word: String) throws(ImageError) -> Snapshot {
        try withSnapshotList { list throws(ImageError) in
            guard let found = list.snapshots.findForDeletion(word) else { throw noSnapshot(word) }
            guard list.viewCounts[found.l1Offset] == nil else {
                throw ImageError(.snapshotInUse(found.name), file: top.file.name)
            }
            list.leaving.insert(found.l1Offset)
            return found
        }
    }

    private func release(_ snapshot: Snapshot) {
        snapshotList.withLock { _ = $0?.leaving.remove(snapshot.l1Offset) }
    }

    private func delete(
        _ snapshot: Snapshot, _ tree: TableTree, _ writing: Writing
    ) throws(ImageError) {
        let rest = try snapshots().filter { $0.l1Offset != snapshot.l1Offset }
        let room = try takeRoom(rest.tableByteCount, writing)
        try writing.beginChange(header)
        try writeTable(of: rest, to: room, writing)
        try writing.commit.now()
        try switchTable(to: rest, at: room, writing)
        // Nothing leads to its tables any more.
        try drop(tree, writing)
        let l1Clusters = FixedTables.clusters(
            of: snapshot.l1Offset, UInt64(snapshot.l1EntryCount) &* 8, clusterBits: map.clusterBits)
        if let l1Clusters {
            writing.guarded.remove(l1Clusters)
            map.drop([l1Clusters])
        }
        try restoreCopied(writing)
        try writing.endChange(header)
    }
}
