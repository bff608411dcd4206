/// The reference counts that an image's refcount blocks say.
struct StoredRefcounts {
    /// Bytes of blocks kept in memory.
    private static let cacheByteCount = 16 << 20

    private let device: any BlockDevice
    let format: RefcountFormat
    private let clusterBits: UInt64
    private let table: [UInt8]
    /// Clusters that a block counts, as a power of two.
    let blockBits: UInt64
    private var blocks: [UInt64: [UInt8]] = [:]
    /// The block that was asked last: mostly the next one is the same.
    private var latest: (index: UInt64, block: [UInt8]) = (.max, [])

    init(_ device: any BlockDevice, header: Header) throws(ImageError) {
        self.device = device
        format = RefcountFormat(order: header.refcountOrder)
        clusterBits = UInt64(header.clusterBits)
        blockBits = header.refcountBlockBits
        let byteCount = UInt64(header.refcountTableClusterCount) &* header.clusterByteCount
        table = try Header.read(Int(byteCount), at: header.refcountTableOffset, of: device)
    }

    /// Clusters counted by the blocks that exist, ascending; no cluster outside has a count.
    var coveredRanges: [Range<UInt64>] {
        (0..<UInt64(table.count / 8)).compactMap { index in
            guard blockOffset(index) != 0 else { return nil }
            return index << blockBits..<(index + 1) << blockBits
        }
    }

    /// Blocks that the table has room for.
    var blockCount: UInt64 { UInt64(table.count / 8) }

    /// The block that counts `cluster`.
    func blockIndex(of cluster: UInt64) -> UInt64 { cluster >> blockBits }

    /// The count of a cluster, nil where its block lies where no block can.
    mutating func count(of cluster: UInt64) throws(ImageError) -> UInt64? {
        let index = cluster >> blockBits
        if index != latest.index {
            let offset = blockOffset(index)
            if offset == 0 { return 0 }
            guard offset & (1 << clusterBits - 1) == 0, offset <= UInt64(Int64.max) else {
                return nil
            }
            latest = (index, try block(index, at: offset))
        }
        let inBlock = Int(cluster & (1 << blockBits - 1))
        return latest.block.withRawBytes { format.count(at: inBlock, in: $0) }
    }

    private mutating func block(_ index: UInt64, at offset: UInt64) throws(ImageError) -> [UInt8] {
        if let block = blocks[index] { return block }
        let block = try read(offset)
        if blocks.count >= max(1, Self.cacheByteCount >> Int(clusterBits)) { blocks.removeAll() }
        blocks[index] = block
        return block
    }

    /// The host offset of a block, 0 where there is none.
    func blockOffset(_ index: UInt64) -> UInt64 {
        guard let position = Int(exactly: index), position < table.count / 8 else { return 0 }
        let bits = table.withRawBytes { $0.bigEndian(at: position * 8, as: UInt64.self) }
        return RefcountTableEntry(bits: bits ?? 0).offset
    }

    private func read(_ offset: UInt64) throws(ImageError) -> [UInt8] {
        var block = [UInt8](repeating: 0, count: 1 << Int(clusterBits))
        do throws(SystemError) {
            try block.withMutableRawBytes { buffer throws(SystemError) in
                try device.readPadded(into: buffer, at: offset)
            }
            return block
        } catch {
            throw ImageError(
                .system(error, operation: "cannot read at offset \(offset)"), file: device.name)
        }
    }
}
