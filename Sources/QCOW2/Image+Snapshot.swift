internal import Logging
internal import Synchronization

/// Internal snapshots: what there is, and reading one.
extension Image {
    /// The internal snapshots of an image as they are now, and who reads them.
    struct SnapshotList: Sendable {
        var snapshots: [Snapshot]
        /// Host offset of the snapshot table.
        var tableOffset: UInt64
        /// Open views, by the host offset of the snapshot's L1 table, which no other one has.
        var viewCounts: [UInt64: Int] = [:]
        /// Snapshots that are being deleted: nobody opens them any more.
        var leaving: Set<UInt64> = []
    }

    /// The internal snapshots, in the order of their making.
    /// - Throws: `.malformed` where the snapshot table makes no sense, `.system`.
    public func snapshots() throws(ImageError) -> [Snapshot] {
        try withSnapshotList { list throws(ImageError) in list.snapshots }
    }

    /// The list, read from the file where that was not done yet.
    func withSnapshotList<Result>(
        _ body: (inout SnapshotList) throws(ImageError) -> Result
    ) throws(ImageError) -> Result {
        try snapshotList.withLock { list throws(ImageError) in
            var read: SnapshotList
            if let list { read = list } else { read = try readSnapshotList() }
            defer { list = read }
            return try body(&read)
        }
    }

    private func readSnapshotList() throws(ImageError) -> SnapshotList {
        SnapshotList(
            snapshots: try header.readSnapshots(from: top.file.device).snapshots,
            tableOffset: header.snapshotsOffset)
    }

    func noSnapshot(_ word: String) -> ImageError {
        ImageError(
            .invalidArgument("there is no snapshot with the name or identifier '\(word)'"),
            file: top.file.name)
    }

    // MARK: Reading one

    /// Opens the disk as it was when the snapshot `word`, an identifier or a name, was made:
    /// a read-only image that shares this one's files, which goes on as before.
    ///
    /// As long as it is open the snapshot cannot be deleted.  This image stays open until it is
    /// closed.
    /// - Throws: `.invalidArgument` where there is no such snapshot, `.malformed`, `.system`.
    public func openSnapshot(_ word: String) throws(ImageError) -> Image {
        guard let snapshot = try snapshots().find(word) else { throw noSnapshot(word) }
        return try openSnapshot(snapshot)
    }

    /// Opens the snapshot that `snapshots()` has as `snapshot`.
    /// - Throws: `.invalidArgument` where there is no such snapshot; what opening an image throws.
    public func openSnapshot(_ snapshot: Snapshot) throws(ImageError) -> Image {
        try withSnapshotList { list throws(ImageError) in
            guard list.snapshots.contains(snapshot), !list.leaving.contains(snapshot.l1Offset)
            else { throw noSnapshot(snapshot.name) }
            list.viewCounts[snapshot.l1Offset, default: 0] += 1
        }
        do throws(ImageError) {
            return try view(of: snapshot)
        } catch {
            endView(of: snapshot.l1Offset)
            throw error
        }
    }

    /// Opens the snapshot `word` of the image at `path`; what is opened for it is closed with it.
    /// - Throws: What `open` throws; `.invalidArgument` where there is no such snapshot.
    public static func openSnapshot(
        _ word: String, ofImageAt path: String, options: OpenOptions = OpenOptions()
    ) throws(ImageError) -> Image {
        var options = options
        options.access = .readOnly
        let image = try open(path, options: options)
        do throws(ImageError) {
            let view = try image.openSnapshot(word)
            view.closesParent.store(true, ordering: .relaxed)
            return view
        } catch {
            try image.close()
            throw error
        }
    }

    private func view(of snapshot: Snapshot) throws(ImageError) -> Image {
        do throws(FormatError) {
            try snapshot.check(clusterByteCount: clusterByteCount)
        } catch {
            throw ImageError(.malformed(error), file: top.file.name)
        }
        var header = header
        header.size = try diskByteCount(of: snapshot)
        header.l1Offset = snapshot.l1Offset
        // What lies behind the disk is VM state.
        header.l1EntryCount = min(
            snapshot.l1EntryCount,
            UInt32(clamping: header.l1EntryCountNeeded(for: header.virtualByteCount)))
        var options = OpenOptions(access: .readOnly, logger: logger)
        options.decompressedCacheByteCount = 4 << 20
        var chain = OpenedChain(capacity: layerCount, options: options)
        chain.ownsFiles = false
        chain.append(
            try Layer(viewing: header, of: layers[0], cacheByteCount: Self.viewCacheByteCount))
        for index in 1..<max(layerCount, 1) { chain.append(Layer(sharing: layers[index])) }
        return try Image(chain, viewing: snapshot.l1Offset, of: self)
    }

    /// Bytes of L2 tables that a view keeps.
    private static let viewCacheByteCount = 4 << 20

    /// Bytes of the disk when `snapshot` was made; as many as now where nobody wrote it down.
    func diskByteCount(of snapshot: Snapshot) throws(ImageError) -> UInt64 {
        let byteCount = snapshot.diskByteCount ?? size
        guard byteCount <= Limits.virtualByteCount,
            header.l1EntryCountNeeded(for: byteCount) &* 8 <= Limits.l1ByteCount
        else {
            throw ImageError(
                .malformed(
                    .tooLarge(
                        "disk of snapshot \(snapshot.id)", value: byteCount,
                        limit: Limits.virtualByteCount)), file: top.file.name)
        }
        return byteCount
    }

    /// A view of the snapshot whose L1 table lies at `l1Offset` was closed.
    func endView(of l1Offset: UInt64) {
        snapshotList.withLock { list in
            let count = list?.viewCounts[l1Offset] ?? 0
            list?.viewCounts[l1Offset] = count > 1 ? count - 1 : nil
        }
    }
}
