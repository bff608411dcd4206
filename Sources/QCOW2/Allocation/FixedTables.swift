/// Tables that a header, a snapshot or a bitmap points to, besides the active L1 table and the
/// refcount structures: where no write of guest data may land.
enum FixedTables {
    /// - Throws: `.malformed` where the snapshot table or the bitmap directory makes no sense.
    static func find(in file: HostFile, header: Header) throws(ImageError) -> [ClusterRun] {
        var runs: [ClusterRun] = []
        func add(_ offset: UInt64, _ byteCount: UInt64) {
            guard byteCount > 0 else { return }
            let bits = UInt64(header.clusterBits)
            let end = (offset &+ byteCount &- 1) &>> bits &+ 1  // both below 2^57
            runs.append(ClusterRun(first: offset &>> bits, count: end &- offset &>> bits))
        }
        let (snapshots, byteCount) = try header.readSnapshots(from: file.device)
        add(header.snapshotsOffset, UInt64(byteCount))
        for snapshot in snapshots { add(snapshot.l1Offset, UInt64(snapshot.l1EntryCount) &* 8) }
        if header.autoclearFeatures.contains(.bitmaps), let bitmaps = header.bitmaps {
            add(bitmaps.directoryOffset, bitmaps.directoryByteCount)
            for bitmap in try header.readBitmaps(from: file.device) {
                add(bitmap.tableOffset, UInt64(bitmap.tableEntryCount) &* 8)
            }
        }
        return runs
    }
}
