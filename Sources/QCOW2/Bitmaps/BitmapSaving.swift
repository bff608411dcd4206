internal import Logging

/// Stores the bitmaps of a session: everything new goes to new clusters, then one switch makes it
/// the image's.
///
/// Until the switch the old directory stands, in which the bitmaps are in use.
struct BitmapSaving {
    private let image: Image
    private let writing: Image.Writing
    private let diskByteCount: UInt64
    private let clusterBits: UInt32
    private let clusterByteCount: UInt64
    /// Clusters taken for what is new, and those that what is new takes the place of.
    private var added: [ClusterRun] = []
    private var dropped: [ClusterRun] = []

    init(_ image: Image, _ writing: Image.Writing) {
        self.image = image
        self.writing = writing
        diskByteCount = image.size
        clusterBits = image.header.clusterBits
        clusterByteCount = image.header.clusterByteCount
    }

    /// Stores `bitmaps` as all that the image has.  Nothing else goes on, and what clients wrote
    /// is durable.
    /// - Parameter old: Where the directory is now; nil where there is none.
    mutating func save(
        _ bitmaps: [LiveBitmap], replacing old: BitmapsExtension?, removed: [LiveBitmap]
    ) throws(ImageError) {
        let directory: BitmapsExtension?
        do throws(ImageError) {
            var entries: [BitmapEntry] = []
            for bitmap in bitmaps { entries.append(try stored(bitmap)) }
            directory = try store(entries)
        } catch {
            for run in added { try writing.allocator.release(run) }
            throw error
        }
        for bitmap in removed { try dropAll(of: bitmap) }
        if let old { drop(old.directoryOffset, byteCount: old.directoryByteCount) }
        // The counts of what is new, and its content, before anything points there.
        try writing.commit.now()
        try BitmapSwitch(file: writing.file, sector: writing.header, header: image.header)
            .point(to: directory)
        writing.map.drop(dropped)
        try writing.commit.finish()
    }

    // MARK: One bitmap

    /// The entry of `bitmap` for the new directory.
    private mutating func stored(_ bitmap: LiveBitmap) throws(ImageError) -> BitmapEntry {
        guard bitmap.condition == .valid else { return bitmap.entry }
        let isUnchanged =
            bitmap.storedByteCount == diskByteCount && bitmap.keptByteCount == diskByteCount
            && bitmap.marks.allSatisfy { $0.pointer.pointee.isEmpty(granules(of: bitmap)) }
        if isUnchanged, bitmap.entry.tableOffset != 0 { return bitmap.entry }
        do throws(ImageError) {
            return try rewritten(bitmap)
        } catch {
            guard case .malformed = error.kind else { throw error }
            // Its table makes no sense: it stays what it is on disk, in use.
            image.logger.error("\(error)")
            var entry = bitmap.entry
            entry.flags |= BitmapEntry.inUse
            return entry
        }
    }

    private func granules(of bitmap: LiveBitmap) -> Range<UInt64> {
        0..<granuleCount(diskByteCount, bitmap.entry)
    }

    private func granuleCount(_ byteCount: UInt64, _ entry: BitmapEntry) -> UInt64 {
        let bits = UInt64(entry.granularityBits)
        return byteCount &>> bits &+ (byteCount & (1 &<< bits &- 1) == 0 ? 0 : 1)
    }

    /// Writes the table of `bitmap`, and those clusters of it that changed.
    private mutating func rewritten(_ bitmap: LiveBitmap) throws(ImageError) -> BitmapEntry {
        var entry = bitmap.entry
        let old = try storedTable(of: bitmap)
        let count = BitmapEntry.tableEntryCount(
            diskByteCount: diskByteCount, granularityBits: entry.granularityBits,
            clusterBits: clusterBits)
        var table: [BitmapTableEntry] = []
        for index in 0..<Int(count) {
            table.append(try storedPart(index, of: bitmap, old))
        }
        for (index, part) in old.entries.enumerated()
        where part.offset != 0 && (index >= table.count || table[index] != part) {
            drop(part.offset, byteCount: clusterByteCount)
        }
        if entry.tableOffset != 0 {
            drop(entry.tableOffset, byteCount: UInt64(entry.tableEntryCount) &* 8)
        }
        entry.tableEntryCount = UInt32(truncatingIfNeeded: count)
        entry.tableOffset = try store(table)
        return entry
    }

    private mutating func store(_ table: [BitmapTableEntry]) throws(ImageError) -> UInt64 {
        // A disk of no bytes: a table without entries takes no room, and must point somewhere.
        if table.isEmpty { return clusterByteCount }
        var bytes = [UInt8](repeating: 0, count: table.count * 8)
        for (index, part) in table.enumerated() { bytes.storeBigEndian(part.bits, at: index * 8) }
        return try write(bytes)
    }

    private func storedTable(of bitmap: LiveBitmap) throws(ImageError) -> BitmapTable {
        try BitmapTable(of: bitmap.entry, in: writing.file, clusterByteCount: clusterByteCount)
    }

    /// What stands in the new table for its part `index`: a cluster's worth of bits.
    private mutating func storedPart(
        _ index: Int, of bitmap: LiveBitmap, _ old: BitmapTable
    ) throws(ImageError) -> BitmapTableEntry {
        let bitCount = clusterByteCount &* 8
        let all = UInt64(index) &* bitCount..<(UInt64(index) &+ 1) &* bitCount
        let now = all.clamped(to: granules(of: bitmap))
        let stored = all.clamped(to: 0..<granuleCount(bitmap.storedByteCount, bitmap.entry))
        let kept = all.clamped(to: 0..<granuleCount(bitmap.keptByteCount, bitmap.entry))
        let found = index < old.entries.count ? old.entries[index] : .zeros
        let isMarked = bitmap.marks.contains { !$0.pointer.pointee.isEmpty(now) }
        // Bits behind the end of a disk are not believed to be zeros.
        let isKept = found == .zeros || stored == now && kept.upperBound >= stored.upperBound
        if !isMarked, isKept { return found }
        let bits = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Int(clusterByteCount), alignment: 4096)
        defer { bits.deallocate() }
        try old.read(index, into: bits)
        bits.clearBits(from: kept.isEmpty ? 0 : kept.upperBound &- all.lowerBound)
        for marks in bitmap.marks { marks.pointer.pointee.add(now, to: bits) }
        return try store(bits)
    }

    /// Finds or makes a place for a cluster of bits.
    private mutating func store(
        _ bits: UnsafeMutableRawBufferPointer
    ) throws(ImageError) -> BitmapTableEntry {
        if ZeroScan.isZero(UnsafeRawBufferPointer(bits)) { return .zeros }
        if bits.allSatisfy({ $0 == 0xFF }) { return .ones }
        let run = try image.allocate(1, exactly: true, writing)
        added.append(joining: run)
        let offset = run.first &<< UInt64(clusterBits)
        try writing.file.write(UnsafeRawBufferPointer(bits), at: offset)
        return BitmapTableEntry(clusterAt: offset)
    }

    // MARK: The directory

    private mutating func store(
        _ entries: [BitmapEntry]
    ) throws(ImageError) -> BitmapsExtension? {
        if entries.isEmpty { return nil }
        let bytes = BitmapEntry.encodeDirectory(entries)
        return BitmapsExtension(
            count: UInt32(truncatingIfNeeded: entries.count),
            directoryByteCount: UInt64(bytes.count), directoryOffset: try write(bytes))
    }

    /// Writes `bytes` to new clusters, one behind the other, and returns where they begin.
    private mutating func write(_ bytes: [UInt8]) throws(ImageError) -> UInt64 {
        let count = (UInt64(bytes.count) &+ clusterByteCount &- 1) &>> UInt64(clusterBits)
        let run = try image.allocate(Int(count), exactly: true, writing)
        added.append(joining: run)
        let offset = run.first &<< UInt64(clusterBits)
        try writing.file.write(bytes, at: offset)
        return offset
    }

    // MARK: What is not needed any more

    private mutating func drop(_ offset: UInt64, byteCount: UInt64) {
        guard byteCount > 0 else { return }
        let bits = UInt64(clusterBits)
        let first = offset &>> bits
        dropped.append(
            joining: ClusterRun(
                first: first, count: (offset &+ byteCount &- 1) &>> bits &- first &+ 1))
    }

    /// Drops the table and the data of a bitmap that is gone.
    private mutating func dropAll(of bitmap: LiveBitmap) throws(ImageError) {
        guard bitmap.entry.tableOffset != 0 else { return }
        do throws(ImageError) {
            for part in try storedTable(of: bitmap).entries where part.offset != 0 {
                drop(part.offset, byteCount: clusterByteCount)
            }
        } catch {
            // Whatever a table without sense points to is not touched: leaks at worst.
            guard case .malformed = error.kind else { throw error }
        }
        drop(bitmap.entry.tableOffset, byteCount: UInt64(bitmap.entry.tableEntryCount) &* 8)
    }
}

extension UnsafeMutableRawBufferPointer {
    /// Clears the bits from number `first` on; the lowest bit of a byte comes first.
    fileprivate func clearBits(from first: UInt64) {
        let byte = Int(truncatingIfNeeded: Swift.min(first &>> 3, UInt64(count)))
        guard byte < count else { return }
        self[byte] &= UInt8(truncatingIfNeeded: 1 &<< (first & 7) &- 1)
        UnsafeMutableRawBufferPointer(rebasing: self[(byte + 1)...])
            .initializeMemory(as: UInt8.self, repeating: 0)
    }
}
