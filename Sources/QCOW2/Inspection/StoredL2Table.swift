/// The entries of an L2 table as an image stores them.
struct StoredL2Table {
    private let bytes: UnsafeRawBufferPointer
    private let isExtended: Bool

    /// - Parameters:
    ///   - bytes: a whole table's.
    ///   - isExtended: whether an entry has a second word, of subclusters.
    init(_ bytes: UnsafeRawBufferPointer, isExtended: Bool) {
        self.bytes = bytes
        self.isExtended = isExtended
    }

    /// Calls `body` with each entry that is not all zero.
    @inline(__always)
    func forEachEntry<Failure: Error>(
        _ body: (L2Entry) throws(Failure) -> Void
    ) throws(Failure) {
        let byteCount = isExtended ? 16 : 8
        for index in 0..<bytes.count / byteCount {
            var entry = L2Entry(bits: word(at: index &* byteCount))
            if isExtended {
                entry.subclusters = SubclusterBitmap(bits: word(at: index &* 16 &+ 8))
                if entry.subclusters.bits | entry.bits == 0 { continue }
            } else if entry.bits == 0 {
                continue
            }
            try body(entry)
        }
    }

    @inline(__always)
    private func word(at offset: Int) -> UInt64 {
        bytes.bigEndian(at: offset, as: UInt64.self) ?? 0
    }
}

/// The L2 tables of an image.
struct StoredL2Tables {
    let device: any BlockDevice
    /// Bytes of a table.
    let byteCount: Int
    let isExtended: Bool
    /// Bytes of the file.
    let fileByteCount: UInt64
    /// How many tables are read at once.
    let threadCount: Int
    /// Called for each table; what it throws ends the reading.
    let tableRead: () throws(ImageError) -> Void

    /// Calls `body` with the tables at `offsets`, in their order, on the caller's thread.
    func forEach(
        at offsets: [UInt64], _ body: (StoredL2Table) throws(ImageError) -> Void
    ) throws(ImageError) {
        // Past the end everything is zero; a hostile L1 table can ask for that very often.
        let inFile = offsets.filter { $0 < fileByteCount }
        for _ in inFile.count..<offsets.count { try tableRead() }
        try TableReader.forEach(
            inFile, byteCount: byteCount, of: device, threadCount: threadCount
        ) { bytes throws(ImageError) in
            try tableRead()
            try body(StoredL2Table(bytes, isExtended: isExtended))
        }
    }
}
