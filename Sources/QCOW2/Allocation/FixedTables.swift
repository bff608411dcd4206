/// Tables that a header, a snapshot or a bitmap points to, besides the active L1 table and the
/// refcount structures: where no write of guest data may land.
enum FixedTables {
    /// - Throws: `.malformed` where the snapshot table or the bitmap directory makes no sense.
    static func find(in file: HostFile, header: Header) throws(ImageError) -> [ClusterRun] {
        var runs: [ClusterRun] = []
        func add(_ offset: UInt64, _ byteCount: UInt64) {
            let run = clusters(of: offset, byteCount, clusterBits: UInt64(header.clusterBits))
            if let run { runs.append(run) }
        }
        let (snapshots, byteCount) = try header.readSnapshots(from: file.device)
        add(header.snapshotsOffset, UInt64(byteCount))
        for snapshot in snapshots {
            do throws(FormatError) {
                try snapshot.check(clusterByteCount: header.clusterByteCount)
            } catch { throw ImageError(.malformed(error), file: file.name) }
            add(snapshot.l1Offset, UInt64(snapshot.l1EntryCount) &* 8)
        }
        if let area = header.encryption { add(area.offset, area.byteCount) }
        if header.autoclearFeatures.contains(.bitmaps), let bitmaps = header.bitmaps {
            add(bitmaps.directoryOffset, bitmaps.directoryByteCount)
            for bitmap in try header.readBitmaps(from: file.device) {
                add(bitmap.tableOffset, UInt64(bitmap.tableEntryCount) &* 8)
            }
        }
        return runs
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
