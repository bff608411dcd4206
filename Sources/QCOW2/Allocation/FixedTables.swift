/// Tables that a header, a snapshot or a bitmap points to, besides the active L1 table and the
/// refcount structures: where no write of guest data may land.
struct FixedTables {
    /// What the header points to: snapshot table, LUKS area, bitmap directory.
    private(set) var ofHeader: [ClusterRun] = []
    /// What these point to: L1 tables of snapshots, bitmap tables.
    private(set) var others: [ClusterRun] = []

    /// - Throws: `.malformed` where the snapshot table or the bitmap directory makes no sense.
    init(in file: HostFile, header: Header) throws(ImageError) {
        func add(_ offset: UInt64, _ byteCount: UInt64, to runs: inout [ClusterRun]) {
            let run = Self.clusters(of: offset, byteCount, clusterBits: UInt64(header.clusterBits))
            if let run { runs.append(run) }
        }
        let (snapshots, byteCount) = try header.readSnapshots(from: file.device)
        add(header.snapshotsOffset, UInt64(byteCount), to: &ofHeader)
        for snapshot in snapshots {
            do throws(FormatError) {
                try snapshot.check(clusterByteCount: header.clusterByteCount)
            } catch { throw ImageError(.malformed(error), file: file.name) }
            add(snapshot.l1Offset, UInt64(snapshot.l1EntryCount) &* 8, to: &others)
        }
        if let area = header.encryption { add(area.offset, area.byteCount, to: &ofHeader) }
        if header.autoclearFeatures.contains(.bitmaps), let bitmaps = header.bitmaps {
            add(bitmaps.directoryOffset, bitmaps.directoryByteCount, to: &ofHeader)
            for bitmap in try header.readBitmaps(from: file.device) {
                add(bitmap.tableOffset, UInt64(bitmap.tableEntryCount) &* 8, to: &others)
            }
        }
    }

    /// The clusters of a table of `byteCount` bytes at `offset`, both below 2^57; nil without any.
    static func clusters(
        of offset: UInt64, _ byteCount: UInt64, clusterBits: UInt64
    ) -> ClusterRun? {
        guard byteCount > 0 else { return nil }
        let end = (offset &+ byteCount &- 1) &>> clusterBits &+ 1
        let first = offset &>> clusterBits
        return ClusterRun(first: first, count: end &- first)
    }
}
