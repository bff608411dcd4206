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
    var counts: [UInt64] = [1]
    var file: [UInt8]
    package let l1Offset: Int
    package let l1EntryCount: Int
    var snapshots: [[UInt8]] = []
    var bitmaps: [UInt8] = []
    var bitmapCount: UInt32 = 0
    var streamEnd = 0

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
}
