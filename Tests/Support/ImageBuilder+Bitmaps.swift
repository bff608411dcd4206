extension ImageBuilder {
    /// Adds a bitmap with a table of one entry that says "all zeros", and returns where the bitmap
    /// directory is.
    @discardableResult
    package mutating func addBitmap(_ name: String) -> Int {
        let table = allocate(byteCount: 8)
        var entry: [UInt8] = []
        entry.put(UInt64(table), at: 0)
        entry.put(UInt32(1), at: 8)  // table entries
        entry.put(UInt32(2), at: 12)  // auto
        entry.put([1, 16], at: 16)  // dirty tracking, 64 KiB
        entry.put(UInt16(name.utf8.count), at: 18)
        entry.put(UInt32(0), at: 20)
        entry.put(Array(name.utf8), at: 24)
        entry += [UInt8](repeating: 0, count: (8 - entry.count % 8) % 8)
        let directory = allocate(byteCount: entry.count)
        put(entry, at: directory)
        var data: [UInt8] = []
        data.put(UInt32(1), at: 0)
        data.put(UInt32(0), at: 4)
        data.put(UInt64(entry.count), at: 8)
        data.put(UInt64(directory), at: 16)
        extensions.append((0x2385_2875, data))
        autoclearFeatures |= 1
        return directory
    }
}
