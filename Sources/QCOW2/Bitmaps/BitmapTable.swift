/// The table of a stored bitmap: where its bits are.
struct BitmapTable {
    let entries: [BitmapTableEntry]
    private let entry: BitmapEntry
    private let file: HostFile
    private let clusterByteCount: UInt64

    /// Reads the table of `entry`.
    /// - Throws: `.malformed` for entries that make no sense, `.system`.
    init(of entry: BitmapEntry, in file: HostFile, clusterByteCount: UInt64) throws(ImageError) {
        self.entry = entry
        self.file = file
        self.clusterByteCount = clusterByteCount
        // At most 8 MiB: a bitmap's data has 512 MiB at most, a cluster 512 bytes at least.
        var bytes = [UInt8](repeating: 0, count: Int(entry.tableEntryCount) * 8)
        try bytes.withMutableRawBytes { buffer throws(ImageError) in
            try file.read(into: buffer, at: entry.tableOffset)
        }
        entries = bytes.withRawBytes { bytes in
            stride(from: 0, to: bytes.count, by: 8).map {
                BitmapTableEntry(bits: bytes.bigEndian(at: $0) ?? 0)
            }
        }
        for (index, found) in entries.enumerated()
        where !found.isValid(clusterByteCount: clusterByteCount) {
            throw ImageError(
                .malformed(
                    .inconsistent(
                        "bitmap '\(entry.name)': table entry \(index) makes no sense "
                            + "(\(hex(found.bits)))")), file: file.name)
        }
    }

    /// Fills `bits`, a cluster, with what table entry `index` stands for; zeros behind the table.
    func read(_ index: Int, into bits: UnsafeMutableRawBufferPointer) throws(ImageError) {
        let found = index < entries.count ? entries[index] : .zeros
        if found.offset != 0 { return try file.read(into: bits, at: found.offset) }
        bits.initializeMemory(as: UInt8.self, repeating: found == .ones ? 0xFF : 0)
    }

    /// Calls `body` with the ranges of a disk of `diskByteCount` bytes that the bitmap marks,
    /// ascending, neighbours joined.
    func forEachMarkedRange(
        diskByteCount: UInt64, _ body: (Range<UInt64>) throws(ImageError) -> Void
    ) throws(ImageError) {
        let bits = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Int(clusterByteCount), alignment: 4096)
        defer { bits.deallocate() }
        var runs = BitRuns()
        for (index, found) in entries.enumerated() where found != .zeros {
            let first = UInt64(index) &* clusterByteCount &* 8
            if found == .ones {
                runs.add(first..<first &+ clusterByteCount &* 8)
            } else {
                try read(index, into: bits)
                // In parts, because every other bit may be a run.
                for start in stride(from: 0, to: bits.count, by: 4096) {
                    let part = UnsafeRawBufferPointer(
                        rebasing: bits[start..<min(start + 4096, bits.count)])
                    runs.add(bitsOf: part, from: first &+ UInt64(start) &* 8)
                    for run in runs.takeEnded() { try tell(run, diskByteCount, body) }
                }
            }
        }
        for run in runs.takeAll() { try tell(run, diskByteCount, body) }
    }

    private func tell(
        _ run: Range<UInt64>, _ diskByteCount: UInt64,
        _ body: (Range<UInt64>) throws(ImageError) -> Void
    ) throws(ImageError) {
        // Bits number 2^32 at most, a granule has 2^31 bytes.
        let granularityBits = UInt64(entry.granularityBits)
        let range = (run.lowerBound &<< granularityBits)..<(run.upperBound &<< granularityBits)
        let inside = range.clamped(to: 0..<diskByteCount)
        if !inside.isEmpty { try body(inside) }
    }
}

/// Runs of ones in a row of bits, which comes in parts.
private struct BitRuns {
    private var runs: [Range<UInt64>] = []

    /// Takes a run in that comes after all others.
    mutating func add(_ run: Range<UInt64>) {
        if let last = runs.last, last.upperBound == run.lowerBound {
            runs[runs.count - 1] = last.lowerBound..<run.upperBound
        } else {
            runs.append(run)
        }
    }

    /// Takes the ones of `bytes` in, whose first bit, the lowest one, has the number `first`.
    mutating func add(bitsOf bytes: UnsafeRawBufferPointer, from first: UInt64) {
        for position in stride(from: 0, to: bytes.count, by: 8) {
            var rest = UInt64(
                littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: UInt64.self))
            var bit = first &+ UInt64(position) &* 8
            while rest != 0 {
                let zeros = UInt64(rest.trailingZeroBitCount)
                rest &>>= zeros
                let ones = UInt64((~rest).trailingZeroBitCount)
                add(bit &+ zeros..<bit &+ zeros &+ ones)
                bit &+= zeros &+ ones
                rest = rest >> ones
            }
        }
    }

    /// The runs that nothing which comes can lengthen.
    mutating func takeEnded() -> [Range<UInt64>] {
        guard let last = runs.popLast() else { return [] }
        defer { runs = [last] }
        return runs
    }

    mutating func takeAll() -> [Range<UInt64>] {
        defer { runs = [] }
        return runs
    }
}
