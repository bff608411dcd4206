extension ImageBuilder {
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
    mutating func placeBitmaps() {
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
}
