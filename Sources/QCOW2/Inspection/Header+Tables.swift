extension Header {
    /// Reads the snapshot table, with the number of bytes that it takes.
    /// - Throws: `.malformed` where it cannot be what it says, `.system`.
    package func readSnapshots(
        from device: any BlockDevice
    ) throws(ImageError) -> (snapshots: [Snapshot], byteCount: Int) {
        guard snapshotCount > 0 else { return ([], 0) }
        var wanted = 65536
        while true {
            // Nobody says how long the table is, so more of it is read until it parses.
            let bytes = try Header.read(wanted, at: snapshotsOffset, of: device)
            do throws(FormatError) {
                return try bytes.withRawBytes { bytes throws(FormatError) in
                    try Snapshot.parseTable(bytes, count: Int(snapshotCount))
                }
            } catch {
                let isWhole = bytes.count < wanted || wanted >= Int(Limits.snapshotTableByteCount)
                guard case .truncated = error, !isWhole else {
                    throw ImageError(.malformed(error), file: device.name)
                }
            }
            wanted = min(wanted * 8, Int(Limits.snapshotTableByteCount))
        }
    }

    /// Reads the snapshots whose L1 tables can be what they say: whatever lies where another says
    /// that its table is, it is no table.
    /// - Throws: As `readSnapshots`.
    func readSoundSnapshots(from device: any BlockDevice) throws(ImageError) -> [Snapshot] {
        try readSnapshots(from: device).snapshots.filter { snapshot in
            (try? snapshot.check(clusterByteCount: clusterByteCount)) != nil
        }
    }

    /// Reads the bitmap directory; empty where the image has no bitmaps that may be believed.
    /// - Throws: `.malformed` where it cannot be what it says, `.system`.
    package func readBitmaps(from device: any BlockDevice) throws(ImageError) -> [BitmapEntry] {
        guard autoclearFeatures.contains(.bitmaps), let bitmaps else { return [] }
        let bytes = try Header.read(
            Int(bitmaps.directoryByteCount), at: bitmaps.directoryOffset, of: device)
        do throws(FormatError) {
            guard UInt64(bytes.count) == bitmaps.directoryByteCount else {
                throw .truncated(
                    "bitmap directory", needed: bitmaps.directoryByteCount,
                    found: UInt64(bytes.count))
            }
            return try bytes.withRawBytes { bytes throws(FormatError) in
                try BitmapEntry.parseDirectory(
                    bytes, count: Int(bitmaps.count), clusterByteCount: clusterByteCount)
            }
        } catch {
            throw ImageError(.malformed(error), file: device.name)
        }
    }

    /// Up to `count` bytes from `offset` on, fewer where the file ends.
    static func read(
        _ count: Int, at offset: UInt64, of device: any BlockDevice
    ) throws(ImageError) -> [UInt8] {
        do throws(SystemError) {
            // No more memory than the file has bytes, whatever the image says.
            let end = try device.byteCount()
            let room = end > offset ? min(UInt64(count), end - offset) : 0
            var bytes = [UInt8](repeating: 0, count: Int(room))
            let found = try bytes.withMutableRawBytes { buffer throws(SystemError) in
                try device.read(into: buffer, at: offset)
            }
            bytes.removeLast(bytes.count - found)
            return bytes
        } catch {
            throw ImageError(.system(error, operation: "cannot read"), file: device.name)
        }
    }
}
