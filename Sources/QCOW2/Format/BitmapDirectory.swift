/// One entry of the bitmap directory (specification, "Bitmap directory").
public struct BitmapEntry: Sendable, Hashable {
    /// Host offset and number of entries of the bitmap table.
    public var tableOffset: UInt64
    public var tableEntryCount: UInt32
    public var flags: UInt32
    /// 1: a dirty tracking bitmap.
    public var type: UInt8
    /// A bit stands for `1 << granularityBits` bytes.
    public var granularityBits: UInt8
    public var name: String
    public var extraData: [UInt8]
    /// Where the entry starts in the directory, in bytes.
    package var directoryOffset: Int

    package static let inUse: UInt32 = 1 << 0
    package static let auto: UInt32 = 1 << 1
    /// Where the flags stand in an entry, in bytes.
    package static let flagsOffset = 12

    /// The bitmap was not closed well: its content means nothing.
    public var isInUse: Bool { flags & BitmapEntry.inUse != 0 }
    /// The bitmap records every write.
    public var isAuto: Bool { flags & BitmapEntry.auto != 0 }

    /// Parses a whole directory of `count` entries.
    package static func parseDirectory(
        _ bytes: UnsafeRawBufferPointer, count: Int, clusterByteCount: UInt64
    ) throws(FormatError) -> [BitmapEntry] {
        var entries: [BitmapEntry] = []
        var names: Set<String> = []
        var offset = 0
        for _ in 0..<count {
            let (entry, length) = try parseEntry(bytes, at: offset)
            try entry.check(clusterByteCount: clusterByteCount)
            guard names.insert(entry.name).inserted else {
                throw .inconsistent("two bitmaps are named '\(entry.name)'")
            }
            entries.append(entry)
            offset &+= (length &+ 7) & ~7
        }
        guard offset == bytes.count else {
            throw .inconsistent(
                "the bitmap directory has \(bytes.count) bytes, its entries \(offset)")
        }
        return entries
    }

    private static func parseEntry(
        _ bytes: UnsafeRawBufferPointer, at offset: Int
    ) throws(FormatError) -> (BitmapEntry, byteCount: Int) {
        guard let tableOffset = bytes.bigEndian(at: offset, as: UInt64.self),
            let tableEntryCount = bytes.bigEndian(at: offset &+ 8, as: UInt32.self),
            let flags = bytes.bigEndian(at: offset &+ 12, as: UInt32.self),
            let type = bytes.bigEndian(at: offset &+ 16, as: UInt8.self),
            let granularity = bytes.bigEndian(at: offset &+ 17, as: UInt8.self),
            let nameLength = bytes.bigEndian(at: offset &+ 18, as: UInt16.self),
            let extraLength = bytes.bigEndian(at: offset &+ 20, as: UInt32.self)
        else {
            throw .truncated(
                "bitmap directory", needed: UInt64(offset &+ 24), found: UInt64(bytes.count))
        }
        let nameStart = offset &+ 24 &+ Int(extraLength)
        let end = nameStart &+ Int(nameLength)
        guard end <= bytes.count else {
            throw .truncated("bitmap directory", needed: UInt64(end), found: UInt64(bytes.count))
        }
        let entry = BitmapEntry(
            tableOffset: tableOffset, tableEntryCount: tableEntryCount, flags: flags, type: type,
            granularityBits: granularity,
            name: String(decoding: bytes[nameStart..<end], as: UTF8.self),
            extraData: Array(bytes[offset &+ 24..<nameStart]), directoryOffset: offset)
        return (entry, end &- offset)
    }

    private func check(clusterByteCount: UInt64) throws(FormatError) {
        guard (1...Limits.bitmapNameByteCount).contains(UInt64(name.utf8.count)) else {
            throw .outOfRange(
                "length of a bitmap's name", value: UInt64(name.utf8.count), allowed: "1 to 1023")
        }
        guard Limits.bitmapGranularityBits.contains(granularityBits) else {
            throw .outOfRange(
                "granularity bits of bitmap '\(name)'", value: UInt64(granularityBits),
                allowed: "9 to 31")
        }
        guard tableOffset != 0, tableOffset & (clusterByteCount &- 1) == 0,
            tableOffset < Limits.hostOffset
        else {
            throw .misaligned(
                "table of bitmap '\(name)'", offset: tableOffset, alignment: clusterByteCount)
        }
        guard UInt64(tableEntryCount) <= Limits.bitmapTableEntryCount,
            UInt64(tableEntryCount) &* clusterByteCount <= Limits.bitmapByteCount
        else {
            throw .tooLarge(
                "table of bitmap '\(name)'", value: UInt64(tableEntryCount),
                limit: min(Limits.bitmapTableEntryCount, Limits.bitmapByteCount / clusterByteCount))
        }
    }
}
