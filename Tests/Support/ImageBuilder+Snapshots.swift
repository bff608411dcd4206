extension ImageBuilder {
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

    /// Stores the snapshot table, and returns where it is.
    mutating func placeSnapshotTable() -> Int {
        var bytes: [UInt8] = []
        for entry in snapshots { bytes.put(entry, at: (bytes.count + 7) / 8 * 8) }
        if bytes.isEmpty { return 0 }
        let offset = allocate(byteCount: bytes.count)
        file.put(bytes, at: offset)
        return offset
    }
}
