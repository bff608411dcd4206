/// Counts every reference to a host cluster that can be reached from an image's header.
///
/// It only reads and counts.  What it meets on its way is told to `report`; what the counts mean is
/// for `ImageCheck` and for repair to judge.
package struct ReferenceWalk {
    /// What the active tables say of the guest's clusters.
    package struct Figures: Equatable, Sendable {
        package var allocated: UInt64 = 0
        /// Allocated clusters that do not lie behind their predecessor; all compressed ones.
        package var fragmented: UInt64 = 0
        package var compressed: UInt64 = 0
    }

    package private(set) var counts = ReferenceCounts()
    package private(set) var figures = Figures()
    /// What refers to clusters past the end of the file, and is not counted.
    private(set) var pastTheEnd = ReferencesPastTheEnd()

    let device: any BlockDevice
    let header: Header
    /// Bytes of the file.
    let fileByteCount: UInt64
    let report: (CheckFinding) -> Void
    let tableRead: () throws(ImageError) -> Void
    let clusterByteCount: UInt64
    /// How many L2 tables are read at once.
    let threadCount: Int
    private let maximum: UInt64

    /// - Parameters:
    ///   - header: The header of the image on `device`.
    ///   - threadCount: How many L2 tables are read at once; at 1 no thread is started.
    ///   - tableRead: Called for each L2 table; what it throws ends the walk.
    package init(
        _ device: any BlockDevice, header: Header, threadCount: Int = 1,
        tableRead: @escaping () throws(ImageError) -> Void = {},
        report: @escaping (CheckFinding) -> Void
    ) throws(ImageError) {
        self.device = device
        self.header = header
        self.report = report
        self.tableRead = tableRead
        clusterByteCount = header.clusterByteCount
        self.threadCount = threadCount
        maximum = RefcountFormat(order: header.refcountOrder).maximum
        do throws(SystemError) {
            fileByteCount = try device.byteCount()
        } catch {
            throw ImageError(.system(error, operation: "cannot find the length"), file: device.name)
        }
    }

    /// Counts everything.
    /// - Parameter countingRefcounts: Whether the refcount table and its blocks count too.
    /// - Throws: `.system` where the file cannot be read, `.malformed` where the snapshot table
    ///   makes no sense, so that the counts would be wrong.
    package mutating func run(countingRefcounts: Bool = true) throws(ImageError) {
        count(0, clusterByteCount)
        try countTree(.active, at: header.l1Offset, entryCount: UInt64(header.l1EntryCount))
        try countSnapshots()
        try countBitmaps()
        if let area = header.encryption { count(area.offset, area.byteCount) }
        guard countingRefcounts else { return }
        count(
            header.refcountTableOffset,
            UInt64(header.refcountTableClusterCount) &* clusterByteCount)
        try countRefcountBlocks()
    }

    /// Adds a reference to every cluster of a region.
    private mutating func count(_ offset: UInt64, _ byteCount: UInt64) {
        guard byteCount > 0 else { return }
        let (sum, overflows) = offset.addingReportingOverflow(byteCount)
        let end = overflows ? .max : sum
        let bits = UInt64(header.clusterBits)
        let clusters = offset >> bits..<(end - 1) >> bits + 1
        // The last cluster may be cut short, but no region may begin to lie past it.
        guard end < fileByteCount || end - fileByteCount < clusterByteCount else {
            pastTheEnd.add(clusters)
            return report(.pastTheEnd(offset: offset, byteCount: byteCount))
        }
        for cluster in clusters where !counts.add(cluster, maximum: maximum) {
            report(.countTooLarge(cluster: cluster))
        }
    }

    // MARK: Tables

    /// Reads `entryCount` big-endian entries and calls `body` with each that is not zero.
    func forEachEntry(
        at offset: UInt64, entryCount: UInt64,
        _ body: (_ index: UInt64, _ entry: UInt64) throws(ImageError) -> Void
    ) throws(ImageError) {
        var buffer = [UInt8](repeating: 0, count: Int(min(entryCount, 8192)) * 8)
        var done: UInt64 = 0
        while done < entryCount {
            let count = min(entryCount - done, 8192)
            // Offsets of tables have 56 bits and their lengths 25, so this cannot overflow.
            try readPadded(&buffer, count: Int(count) * 8, at: offset &+ done &* 8)
            try buffer.withRawBytes { bytes throws(ImageError) in
                for index in 0..<count {
                    let entry = bytes.bigEndian(at: Int(index) &* 8, as: UInt64.self) ?? 0
                    if entry != 0 { try body(done + index, entry) }
                }
            }
            done += count
        }
    }

    private func readPadded(
        _ buffer: inout [UInt8], count: Int, at offset: UInt64
    ) throws(ImageError) {
        do throws(SystemError) {
            try buffer.withMutableRawBytes { buffer throws(SystemError) in
                try device.readPadded(
                    into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]), at: offset)
            }
        } catch {
            throw ImageError(
                .system(error, operation: "cannot read at offset \(offset)"), file: device.name)
        }
    }

    private mutating func countTree(
        _ owner: CheckFinding.Owner, at offset: UInt64, entryCount: UInt64
    ) throws(ImageError) {
        count(offset, entryCount &* 8)
        var tables: [UInt64] = []
        try forEachEntry(at: offset, entryCount: entryCount) { index, bits in
            let entry = L1Entry(bits: bits)
            if entry.reservedBits != 0 {
                report(.l1EntryReserved(owner, index: index, entry: bits))
            }
            if entry.offset & (clusterByteCount &- 1) != 0 {
                report(.l2TableMisaligned(owner, index: index, offset: entry.offset))
            }
            tables.append(entry.offset)
        }
        for table in tables { count(table, clusterByteCount) }
        try l2Tables.forEach(at: tables) { table in
            var expected: UInt64?
            table.forEachEntry { count($0, isActive: owner == .active, expected: &expected) }
        }
    }

    /// - Parameter expected: Where the next data cluster of the table lies, if it is contiguous.
    private mutating func count(_ entry: L2Entry, isActive: Bool, expected: inout UInt64?) {
        if entry.isCompressed { return countCompressed(entry, isActive: isActive) }
        if entry.reservedBits != 0 { report(.l2EntryReserved(entry: entry.bits)) }
        checkSubclusters(of: entry)
        guard entry.offset != 0 || header.hasDataFile && entry.showsData else { return }
        if entry.offset & (clusterByteCount &- 1) != 0 {
            report(
                entry.hasZeroFlag && !isExtended
                    ? .zeroMisaligned(entry: entry.bits) : .dataMisaligned(entry: entry.bits))
        }
        if isActive {
            figures.allocated += 1
            if let expected, expected != entry.offset { figures.fragmented += 1 }
            expected = entry.offset &+ clusterByteCount
        }
        // A data file's clusters have no counts.
        if !header.hasDataFile { count(entry.offset, clusterByteCount) }
    }

    private func checkSubclusters(of entry: L2Entry) {
        let bitmap = entry.subclusters
        if !entry.hasCluster(inDataFile: header.hasDataFile), bitmap.allocated != 0 {
            report(.subclustersWithoutCluster(bitmap: bitmap.bits))
        } else if bitmap.clashes {
            report(.subclustersClash(entry: entry.bits, bitmap: bitmap.bits))
        }
    }

    private mutating func countCompressed(_ entry: L2Entry, isActive: Bool) {
        if entry.isCopied { report(.compressedAndCopied(entry: entry.bits)) }
        if header.hasDataFile { return report(.compressedWithDataFile(entry: entry.bits)) }
        if entry.subclusters != .none {
            report(.compressedWithBitmap(entry: entry.bits, bitmap: entry.subclusters.bits))
        }
        let stream = CompressedDescriptor(entry, clusterBits: header.clusterBits)
        count(stream.offset, UInt64(stream.byteCount))
        // One with a bitmap is none of a disk's clusters: nothing reads it.
        guard isActive, entry.subclusters == .none else { return }
        figures.allocated += 1
        figures.fragmented += 1
        figures.compressed += 1
    }

    // MARK: Snapshots and bitmaps

    private mutating func countSnapshots() throws(ImageError) {
        let (snapshots, byteCount) = try header.readSnapshots(from: device)
        if header.hasDataFile, !snapshots.isEmpty {
            report(.snapshotsWithDataFile(count: header.snapshotCount))
        }
        for snapshot in snapshots {
            let (id, name) = (snapshot.id, snapshot.name)
            if header.version >= 3 && snapshot.extraData.count < 16 {
                report(.snapshotIncomplete(id: id, name: name))
            }
            do throws(FormatError) {
                try snapshot.check(clusterByteCount: clusterByteCount)
            } catch {
                report(.snapshotTable(id: id, name: name, error))
                continue
            }
            try countTree(
                .snapshot(id: id, name: name), at: snapshot.l1Offset,
                entryCount: UInt64(snapshot.l1EntryCount))
        }
        count(header.snapshotsOffset, UInt64(byteCount))
    }

    private mutating func countBitmaps() throws(ImageError) {
        guard header.autoclearFeatures.contains(.bitmaps), let directory = header.bitmaps else {
            return
        }
        count(directory.directoryOffset, directory.directoryByteCount)
        let bitmaps: [BitmapEntry]
        do throws(ImageError) {
            bitmaps = try header.readBitmaps(from: device)
        } catch {
            guard case .malformed(let reason) = error.kind else { throw error }
            return report(.bitmapDirectory(reason))
        }
        for bitmap in bitmaps { try count(bitmap) }
    }

    private mutating func count(_ bitmap: BitmapEntry) throws(ImageError) {
        if !bitmap.isUnderstood {
            report(.bitmapNotUnderstood(name: bitmap.name))
        } else if !bitmap.isInUse,
            !bitmap.fits(diskByteCount: header.virtualByteCount, clusterBits: header.clusterBits)
        {
            report(.bitmapLength(name: bitmap.name, entryCount: bitmap.tableEntryCount))
        }
        let entryCount = UInt64(bitmap.tableEntryCount)
        count(bitmap.tableOffset, entryCount &* 8)
        var clusters: [UInt64] = []
        try forEachEntry(at: bitmap.tableOffset, entryCount: entryCount) { index, entry in
            // 1 stands for a cluster of ones that is stored nowhere.
            if entry == 1 { return }
            let offset = L1Entry(bits: entry).offset
            guard offset == entry, offset & (clusterByteCount &- 1) == 0 else {
                return report(.bitmapEntryReserved(name: bitmap.name, index: index, entry: entry))
            }
            clusters.append(offset)
        }
        for cluster in clusters { count(cluster, clusterByteCount) }
    }

    // MARK: Refcount blocks

    private mutating func countRefcountBlocks() throws(ImageError) {
        let clusterBits = UInt64(header.clusterBits)
        let clusterCount =
            fileByteCount >> clusterBits
            + (fileByteCount & (clusterByteCount - 1) == 0 ? 0 : 1)
        var blocks: [(index: UInt64, offset: UInt64)] = []
        let entryCount = UInt64(header.refcountTableClusterCount) &* (clusterByteCount / 8)
        try forEachEntry(at: header.refcountTableOffset, entryCount: entryCount) { index, bits in
            let entry = RefcountTableEntry(bits: bits)
            if entry.reservedBits != 0 {
                report(.refcountTableEntryReserved(index: index, entry: bits))
            } else if entry.offset & (clusterByteCount &- 1) != 0 {
                report(.refcountBlockMisaligned(index: index, offset: entry.offset))
            } else if entry.offset >> clusterBits >= clusterCount {
                report(.refcountBlockOutside(index: index, offset: entry.offset))
            } else {
                blocks.append((index, entry.offset))
            }
        }
        for block in blocks {
            count(block.offset, clusterByteCount)
            let references = counts.count(of: block.offset >> clusterBits)
            if references != 1 {
                report(.refcountBlockShared(index: block.index, count: references))
            }
        }
    }
}
