/// A new image that is written front to back: header, refcount table and blocks, L1 table, and then
/// each L2 table with its clusters behind it.
///
/// Which clusters hold something is known before the first byte is written, so every count is 1 and
/// every table is complete when it is written.
struct StreamedImage: Sendable {
    /// Which clusters of each L2 table's part of the disk hold something, a bit each.
    struct Allocation: Sendable {
        /// By L1 index.
        private(set) var tables: [Int: [UInt64]] = [:]
        let clusterBits: UInt64
        /// Entries of an L2 table, as a power of two.
        let tableBits: UInt64

        init(clusterBits: UInt64, tableBits: UInt64) {
            self.clusterBits = clusterBits
            self.tableBits = tableBits
        }

        /// Takes note that `range` of the disk, which is not empty, holds something.
        mutating func insert(_ range: Range<UInt64>) {
            for cluster in range.lowerBound >> clusterBits...(range.upperBound - 1) >> clusterBits {
                let index = Int(cluster & (1 << tableBits - 1))
                let words = max(1, 1 << Int(tableBits) / 64)
                tables[Int(cluster >> tableBits), default: Array(repeating: 0, count: words)][
                    index / 64] |= 1 << UInt64(index % 64)
            }
        }
    }

    /// A table, and where it lies.
    private struct Table: Sendable {
        let index: Int
        let cluster: UInt64
        let allocated: [UInt64]
        let count: UInt64
    }

    private let header: Header
    private let size: UInt64
    private let tables: [Table]
    private let tableBits: UInt64
    private let blockCount: UInt64
    private let refcountTableClusterCount: UInt64
    private let l1ClusterCount: UInt64
    private let clusterCount: UInt64

    private var cluster: UInt64 { header.clusterByteCount }

    /// - Parameters:
    ///   - empty: the header of an image of the same kind without clusters.
    init(like empty: Header, _ allocation: Allocation, file: String) throws(ImageError) {
        var header = empty
        size = empty.virtualByteCount
        tableBits = allocation.tableBits
        let cluster = empty.clusterByteCount
        l1ClusterCount = (UInt64(empty.l1EntryCount) * 8 + cluster - 1) / cluster
        let sorted = allocation.tables.sorted { $0.key < $1.key }
        let used = sorted.reduce(1 + l1ClusterCount) { sum, table in
            sum + 1 + table.value.reduce(0) { $0 + UInt64($1.nonzeroBitCount) }
        }
        let perBlock = cluster * 8 / UInt64(empty.refcountBits)
        // Blocks and table count themselves too.
        var blocks: UInt64 = 1
        var table: UInt64 = 1
        while true {
            let needed = (used + table + blocks + perBlock - 1) / perBlock
            let room = (needed * 8 + cluster - 1) / cluster
            if needed <= blocks && room <= table { break }
            blocks = max(blocks, needed)
            table = max(table, room)
        }
        guard table * cluster <= Limits.refcountTableByteCount else {
            throw ImageError(
                .invalidArgument("too many clusters for one image; take a larger cluster size"),
                file: file)
        }
        blockCount = blocks
        refcountTableClusterCount = table
        clusterCount = used + table + blocks
        header.refcountTableOffset = cluster
        header.refcountTableClusterCount = UInt32(table)
        header.l1Offset = header.l1EntryCount == 0 ? 0 : (1 + table + blocks) * cluster
        self.header = header
        var next = 1 + table + blocks + l1ClusterCount
        tables = sorted.map { index, allocated in
            let count = allocated.reduce(0) { $0 + UInt64($1.nonzeroBitCount) }
            defer { next += 1 + count }
            return Table(index: index, cluster: next, allocated: allocated, count: count)
        }
    }

    // MARK: Its pieces, in their order

    /// Where in the image a piece is taken next.
    struct Cursor: Sendable {
        fileprivate var block: UInt64 = 0
        fileprivate var hasBegun = false
        fileprivate var hasL1 = false
        fileprivate var table = 0
        fileprivate var hasTable = false
        fileprivate var entry = 0
    }

    /// The next piece; nil at the end.
    func next(_ cursor: inout Cursor) throws(ImageError) -> OrderedOutput.Piece? {
        if !cursor.hasBegun {
            cursor.hasBegun = true
            return .bytes(try headerAndRefcountTable())
        }
        if cursor.block < blockCount {
            defer { cursor.block += 1 }
            return .bytes(refcountBlock(cursor.block))
        }
        if !cursor.hasL1 {
            cursor.hasL1 = true
            return .bytes(l1Table())
        }
        while cursor.table < tables.count {
            if !cursor.hasTable {
                cursor.hasTable = true
                return .bytes(l2Table(tables[cursor.table]))
            }
            if let piece = nextRun(in: tables[cursor.table], &cursor.entry) { return piece }
            cursor.table += 1
            cursor.hasTable = false
            cursor.entry = 0
        }
        return nil
    }

    private func headerAndRefcountTable() throws(ImageError) -> [UInt8] {
        var bytes: [UInt8]
        do throws(FormatError) {
            bytes = try header.encoded()
        } catch {
            throw ImageError(.malformed(error), file: "")
        }
        let first = Int(cluster)
        bytes += repeatElement(
            0, count: first * Int(1 + refcountTableClusterCount) - bytes.count)
        for block in 0..<blockCount {
            let offset = (1 + refcountTableClusterCount + block) * cluster
            bytes.storeBigEndian(offset, at: first + Int(block) * 8)
        }
        return bytes
    }

    /// Every cluster of the image has one reference.
    private func refcountBlock(_ number: UInt64) -> [UInt8] {
        let format = RefcountFormat(order: header.refcountOrder)
        let perBlock = UInt64(format.entryCount(inBytes: Int(cluster)))
        let count = min(perBlock, clusterCount - min(number * perBlock, clusterCount))
        var bytes = [UInt8](repeating: 0, count: Int(cluster))
        bytes.withUnsafeMutableBytes { bytes in
            for index in 0..<Int(count) { format.store(1, at: index, in: bytes) }
        }
        return bytes
    }

    private func l1Table() -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Int(l1ClusterCount * cluster))
        for table in tables {
            bytes.storeBigEndian(
                L1Entry(copiedTableAt: table.cluster * cluster).bits, at: table.index * 8)
        }
        return bytes
    }

    private func l2Table(_ table: Table) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Int(cluster))
        let entryByteCount = Int(header.l2EntryByteCount)
        var host = (table.cluster + 1) * cluster
        for index in 0..<1 << Int(tableBits) where table.allocated.hasBit(index) {
            bytes.storeBigEndian(
                L2Entry(copiedClusterAt: host).bits, at: index * entryByteCount)
            if entryByteCount == 16 {
                bytes.storeBigEndian(
                    SubclusterBitmap(allocated: .max, zero: 0).bits, at: index * 16 + 8)
            }
            host += cluster
        }
        return bytes
    }

    /// The clusters from `entry` on that follow each other, as many as a piece has room for.
    private func nextRun(in table: Table, _ entry: inout Int) -> OrderedOutput.Piece? {
        let end = 1 << Int(tableBits)
        while entry < end, !table.allocated.hasBit(entry) { entry += 1 }
        guard entry < end else { return nil }
        let first = entry
        let limit = max(1, OrderedOutput.pieceByteCount / Int(cluster))
        while entry < end, entry - first < limit, table.allocated.hasBit(entry) { entry += 1 }
        let offset = (UInt64(table.index) << tableBits + UInt64(first)) * cluster
        let byteCount = UInt64(entry - first) * cluster
        // The disk may end before its last cluster does.
        let count = min(byteCount, size - min(offset, size))
        return .disk(offset: offset, count: Int(count), byteCount: Int(byteCount))
    }
}

extension [UInt64] {
    fileprivate func hasBit(_ index: Int) -> Bool {
        self[index / 64] >> UInt64(index % 64) & 1 != 0
    }
}
