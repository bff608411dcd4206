extension ImageBuilder {
    /// The image: what was put in, the snapshot table, the counts and the header.
    package func build() -> [UInt8] {
        var image = self
        let snapshotsOffset = image.placeSnapshotTable()
        image.placeBitmaps()
        let table = image.placeRefcounts()
        image.placeHeader(refcountTable: table, snapshotsOffset: snapshotsOffset)
        return image.file
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
