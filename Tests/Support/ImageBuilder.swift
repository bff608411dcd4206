/// Builds a qcow2 image byte by byte, in view of the test that needs it.
///
/// Clusters are given out upwards from the second one, in the order of the calls, so a test can
/// know where everything lies.  `build()` adds counts and the header; a test that wants a broken
/// image pokes into the bytes it returns.
package struct ImageBuilder {
    package let version: UInt32
    package let clusterBits: Int
    package let byteCount: Int
    package let refcountOrder: Int
    /// Whether L2 entries have a second word, for 32 subclusters.
    package let isExtended: Bool
    package var compressionType: UInt8 = 0
    package var headerLength = 112
    package var incompatibleFeatures: UInt64 = 0
    package var compatibleFeatures: UInt64 = 0
    package var autoclearFeatures: UInt64 = 0
    package var backingName: String?
    package var extensions: [(type: UInt32, data: [UInt8])] = []
    /// Bytes of the guest that stand for what a snapshot keeps; counts of host clusters.
    private(set) var counts: [UInt64] = [1]
    private var file: [UInt8]
    package let l1Offset: Int
    package let l1EntryCount: Int
    private var snapshots: [[UInt8]] = []
    private var bitmaps: [UInt8] = []
    private var bitmapCount: UInt32 = 0
    private var streamEnd = 0

    package var clusterSize: Int { 1 << clusterBits }
    package var entrySize: Int { isExtended ? 16 : 8 }
    package var entriesPerTable: Int { clusterSize / entrySize }
    package var subclusterSize: Int { clusterSize / 32 }
    package var guestClusterCount: Int { (byteCount + clusterSize - 1) / clusterSize }

    static let copied: UInt64 = 1 << 63

    /// An empty image of `byteCount` guest bytes; version 2 always has 16-bit counts.
    package init(
        byteCount: Int, version: UInt32 = 3, clusterBits: Int = 16, refcountOrder: Int = 4,
        extraL1Entries: Int = 0, isExtended: Bool = false
    ) {
        self.version = version
        self.clusterBits = clusterBits
        self.byteCount = byteCount
        self.refcountOrder = version == 2 ? 4 : refcountOrder
        self.isExtended = isExtended
        incompatibleFeatures = isExtended ? 16 : 0
        let clusterSize = 1 << clusterBits
        let coverage = clusterSize * (clusterSize / (isExtended ? 16 : 8))
        l1EntryCount = (byteCount + coverage - 1) / coverage + extraL1Entries
        l1Offset = clusterSize
        file = [UInt8](repeating: 0, count: clusterSize)
        _ = allocate(byteCount: max(l1EntryCount * 8, 1))
    }

    // MARK: Host clusters

    /// Takes the next clusters of the file, each with one reference, and returns where they start.
    package mutating func allocate(byteCount: Int) -> Int {
        let offset = counts.count * clusterSize
        let clusters = (byteCount + clusterSize - 1) / clusterSize
        counts += Array(repeating: 1, count: clusters)
        let end = offset + clusters * clusterSize
        file.append(contentsOf: [UInt8](repeating: 0, count: end - file.count))
        return offset
    }

    /// Adds `change` to the count of every host cluster that `range` touches.
    package mutating func count(_ range: Range<Int>, by change: UInt64) {
        for cluster in range.lowerBound >> clusterBits...(range.upperBound - 1) >> clusterBits {
            while counts.count <= cluster { counts.append(0) }
            counts[cluster] &+= change
        }
    }

    package mutating func put(_ bytes: [UInt8], at offset: Int) { file.put(bytes, at: offset) }
    package mutating func put(_ number: UInt64, at offset: Int) { file.put(number, at: offset) }

    // MARK: Guest clusters

    /// Where the L2 entry of a guest cluster lies, in a table of the active disk's own: it is
    /// made where there is none, and copied where a snapshot shares it.
    package mutating func entryOffset(_ guestCluster: Int) -> Int {
        let slot = l1Offset + guestCluster / entriesPerTable * 8
        let pointer = file.number(at: slot, as: UInt64.self)
        var table = Int(pointer & ReferenceReader.offsetMask)
        if pointer & Self.copied == 0 {
            let own = allocate(byteCount: clusterSize)
            if table != 0 {
                file.put(Array(file[table..<table + clusterSize]), at: own)
                count(table..<table + clusterSize, by: ~0)
            }
            table = own
            file.put(UInt64(own) | Self.copied, at: slot)
        }
        return table + guestCluster % entriesPerTable * entrySize
    }

    /// Stores a raw L2 entry; counts are the caller's business.
    package mutating func setEntry(_ raw: UInt64, guestCluster: Int) {
        file.put(raw, at: entryOffset(guestCluster))
    }

    /// Stores the second word of an extended entry.
    package mutating func setBitmap(_ bitmap: UInt64, guestCluster: Int) {
        file.put(bitmap, at: entryOffset(guestCluster) + 8)
    }

    /// Gives a guest cluster a host cluster of its own with `bytes` in it, and says where.
    @discardableResult
    package mutating func write(_ bytes: [UInt8], guestCluster: Int) -> Int {
        let entry = entryOffset(guestCluster)
        let old = file.number(at: entry, as: UInt64.self)
        precondition(old >> 62 & 1 == 0, "the builder does not overwrite streams")
        if case let host = Int(old & ReferenceReader.offsetMask), host != 0 {
            count(host..<host + clusterSize, by: ~0)
        }
        let host = allocate(byteCount: clusterSize)
        file.put(bytes, at: host)
        file.put(UInt64(host) | Self.copied, at: entry)
        if isExtended { file.put(UInt64(UInt32.max), at: entry + 8) }
        return host
    }

    /// Fills a guest cluster with one byte.
    @discardableResult
    package mutating func fill(_ byte: UInt8, guestCluster: Int) -> Int {
        write([UInt8](repeating: byte, count: clusterSize), guestCluster: guestCluster)
    }

    package mutating func zero(guestCluster: Int) {
        if isExtended { return setBitmap(~0 << 32, guestCluster: guestCluster) }
        setEntry(1, guestCluster: guestCluster)
    }

    /// A zero cluster that keeps a host cluster, with `garbage` in it.
    @discardableResult
    package mutating func zeroAllocated(guestCluster: Int, garbage: UInt8 = 0xEE) -> Int {
        let host = fill(garbage, guestCluster: guestCluster)
        keepSpaceOnly(guestCluster: guestCluster)
        return host
    }

    /// Makes a data cluster a zero cluster that keeps its host cluster.
    package mutating func keepSpaceOnly(guestCluster: Int) {
        if isExtended { return setBitmap(~0 << 32, guestCluster: guestCluster) }
        let entry = entryOffset(guestCluster)
        file.put(file.number(at: entry, as: UInt64.self) | 1, at: entry)
    }

    /// Stores a guest cluster as a compressed stream behind the last one.
    @discardableResult
    package mutating func compress(_ bytes: [UInt8], guestCluster: Int) -> Int {
        let stream = compressionType == 0 ? Streams.deflate(bytes) : Streams.zstd(bytes)
        return place(stream: stream, guestCluster: guestCluster)
    }

    /// Stores a stream behind the last one, in the same host cluster where there is room and the
    /// counts are wide enough to share it.
    @discardableResult
    package mutating func place(stream: [UInt8], guestCluster: Int) -> Int {
        _ = entryOffset(guestCluster)
        let room = (clusterSize - streamEnd % clusterSize) % clusterSize
        if refcountOrder == 0 || room < stream.count {
            streamEnd = allocate(byteCount: stream.count)
            count(streamEnd..<streamEnd + stream.count, by: ~0)
        }
        let start = streamEnd
        place(stream: stream, guestCluster: guestCluster, at: start)
        streamEnd = start + stream.count
        return start
    }

    /// Stores a stream at `offset` and counts every host cluster that it touches.
    package mutating func place(stream: [UInt8], guestCluster: Int, at offset: Int) {
        let entry = entryOffset(guestCluster)
        file.put(stream, at: offset)
        let sectors = (offset + stream.count - 1) / 512 - offset / 512
        let split = 62 - (clusterBits - 8)
        file.put(1 << 62 | UInt64(sectors) << split | UInt64(offset), at: entry)
        count(offset..<offset + stream.count, by: 1)
    }

    // MARK: Snapshots

    /// Keeps the disk as it is now under `name`: every cluster has one reference more from here.
    package mutating func snapshot(_ name: String, extraLength: Int = 16) {
        let table = allocate(byteCount: max(l1EntryCount * 8, 1))
        for index in 0..<l1EntryCount {
            let slot = l1Offset + index * 8
            let l2 = Int(file.number(at: slot, as: UInt64.self) & ReferenceReader.offsetMask)
            if l2 == 0 { continue }
            file.put(UInt64(l2), at: slot)
            file.put(UInt64(l2), at: table + index * 8)
            count(l2..<l2 + clusterSize, by: 1)
            for position in 0..<entriesPerTable { share(entryAt: l2 + position * entrySize) }
        }
        snapshots.append(snapshotEntry(table, name, extraLength))
        // The next stream must not be appended to what the snapshot keeps.
        streamEnd = 0
    }

    private mutating func share(entryAt position: Int) {
        let raw = file.number(at: position, as: UInt64.self)
        if raw >> 62 & 1 == 1 {
            let split = 62 - (clusterBits - 8)
            let offset = Int(raw & ((1 << split) - 1))
            let sectors = Int(raw >> split & ((1 << (clusterBits - 8)) - 1)) + 1
            count(offset & ~511..<(offset & ~511) + sectors * 512, by: 1)
        } else {
            file.put(raw & ~Self.copied, at: position)
            let host = Int(raw & ReferenceReader.offsetMask)
            if host != 0 { count(host..<host + clusterSize, by: 1) }
        }
    }

    private func snapshotEntry(_ table: Int, _ name: String, _ extraLength: Int) -> [UInt8] {
        let id = Array("\(snapshots.count + 1)".utf8)
        var entry: [UInt8] = []
        entry.put(UInt64(table), at: 0)
        entry.put(UInt32(l1EntryCount), at: 8)
        entry.put(UInt16(id.count), at: 12)
        entry.put(UInt16(name.utf8.count), at: 14)
        entry.put(UInt32(1_700_000_000), at: 16)
        entry.put(UInt32(0), at: 20)
        entry.put(UInt64(0), at: 24)
        entry.put(UInt32(0), at: 32)
        entry.put(UInt32(extraLength), at: 36)
        var extra = [UInt8](repeating: 0, count: extraLength)
        if extraLength >= 16 { extra.put(UInt64(byteCount), at: 8) }
        return entry + extra + id + Array(name.utf8)
    }

    // MARK: Bitmaps

    /// Adds a dirty bitmap, recording unless `flags` say otherwise, whose bits are `bits`: the
    /// lowest one of a byte comes first, zeros follow.
    package mutating func bitmap(
        _ name: String, granularityBits: Int = 16, flags: UInt32 = 2, type: UInt8 = 1,
        bits: [UInt8] = [], extra: [UInt8] = []
    ) {
        let covered = clusterSize * 8 << granularityBits
        let count = (byteCount + covered - 1) / covered
        let table = allocate(byteCount: count * 8)
        for (index, start) in stride(from: 0, to: bits.count, by: clusterSize).enumerated() {
            let data = allocate(byteCount: clusterSize)
            put(Array(bits[start..<min(start + clusterSize, bits.count)]), at: data)
            put(UInt64(data), at: table + index * 8)
        }
        var entry: [UInt8] = []
        entry.put(UInt64(table), at: 0)
        entry.put(UInt32(count), at: 8)
        entry.put(flags, at: 12)
        entry.put([type, UInt8(granularityBits)], at: 16)
        entry.put(UInt16(name.utf8.count), at: 18)
        entry.put(UInt32(extra.count), at: 20)
        entry += extra + Array(name.utf8)
        bitmaps += entry + [UInt8](repeating: 0, count: (8 - entry.count % 8) % 8)
        bitmapCount += 1
    }

    /// Stores the bitmap directory, and its place in the header.
    private mutating func placeBitmaps() {
        if bitmapCount == 0 { return }
        let directory = allocate(byteCount: bitmaps.count)
        put(bitmaps, at: directory)
        var data: [UInt8] = []
        data.put(bitmapCount, at: 0)
        data.put(UInt32(0), at: 4)
        data.put(UInt64(bitmaps.count), at: 8)
        data.put(UInt64(directory), at: 16)
        extensions.append((0x2385_2875, data))
        autoclearFeatures |= 1
    }

    // MARK: The whole

    /// The image: what was put in, the snapshot table, the counts and the header.
    package func build() -> [UInt8] {
        var image = self
        let snapshotsOffset = image.placeSnapshotTable()
        image.placeBitmaps()
        let table = image.placeRefcounts()
        image.placeHeader(refcountTable: table, snapshotsOffset: snapshotsOffset)
        return image.file
    }

    private mutating func placeSnapshotTable() -> Int {
        var bytes: [UInt8] = []
        for entry in snapshots { bytes.put(entry, at: (bytes.count + 7) / 8 * 8) }
        if bytes.isEmpty { return 0 }
        let offset = allocate(byteCount: bytes.count)
        file.put(bytes, at: offset)
        return offset
    }

    /// Appends the refcount table and its blocks, which count themselves.
    private mutating func placeRefcounts() -> Range<Int> {
        let bits = 1 << refcountOrder
        let perBlock = clusterSize * 8 / bits
        var blocks = 0
        var tables = 1
        while true {
            let needed = (counts.count + blocks + tables + perBlock - 1) / perBlock
            let tablesNeeded = (needed * 8 + clusterSize - 1) / clusterSize
            if (needed, tablesNeeded) == (blocks, tables) { break }
            (blocks, tables) = (needed, tablesNeeded)
        }
        let table = allocate(byteCount: tables * clusterSize)
        let first = allocate(byteCount: blocks * clusterSize)
        for block in 0..<blocks {
            file.put(UInt64(first + block * clusterSize), at: table + block * 8)
        }
        for (cluster, count) in counts.enumerated() where count > 0 {
            let block = first + cluster / perBlock * clusterSize
            setCounter(cluster % perBlock, in: block, to: count)
        }
        return table..<table + tables * clusterSize
    }

    private mutating func setCounter(_ index: Int, in block: Int, to count: UInt64) {
        precondition(refcountOrder == 6 || count >> (1 << refcountOrder) == 0, "count too wide")
        switch refcountOrder {
        case 0, 1, 2:
            let bit = index << refcountOrder
            file[block + bit / 8] |= UInt8(count) << (bit % 8)
        case 3: file[block + index] = UInt8(count)
        case 4: file.put(UInt16(count), at: block + index * 2)
        case 5: file.put(UInt32(count), at: block + index * 4)
        default: file.put(count, at: block + index * 8)
        }
    }

    private mutating func placeHeader(refcountTable: Range<Int>, snapshotsOffset: Int) {
        file.put(UInt32(0x5146_49fb), at: 0)
        file.put(version, at: 4)
        file.put(UInt32(clusterBits), at: 20)
        file.put(UInt64(byteCount), at: 24)
        file.put(UInt32(l1EntryCount), at: 36)
        file.put(UInt64(l1Offset), at: 40)
        file.put(UInt64(refcountTable.lowerBound), at: 48)
        file.put(UInt32(refcountTable.count / clusterSize), at: 56)
        file.put(UInt32(snapshots.count), at: 60)
        file.put(UInt64(snapshotsOffset), at: 64)
        if version >= 3 {
            file.put(incompatibleFeatures | (compressionType == 0 ? 0 : 8), at: 72)
            file.put(compatibleFeatures, at: 80)
            file.put(autoclearFeatures, at: 88)
            file.put(UInt32(refcountOrder), at: 96)
            file.put(UInt32(headerLength), at: 100)
            if headerLength > 104 { file[104] = compressionType }
        }
        var position = version >= 3 ? headerLength : 72
        for (type, data) in extensions {
            file.put(type, at: position)
            file.put(UInt32(data.count), at: position + 4)
            file.put(data, at: position + 8)
            position += 8 + (data.count + 7) / 8 * 8
        }
        file.put(UInt64(0), at: position)
        if let name = backingName.map({ Array($0.utf8) }) {
            file.put(name, at: position + 8)
            file.put(UInt64(position + 8), at: 8)
            file.put(UInt32(name.count), at: 16)
        }
        precondition(file.count >= clusterSize && position + 8 <= clusterSize, "header too long")
    }
}
