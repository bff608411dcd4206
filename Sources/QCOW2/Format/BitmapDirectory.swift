/// One entry of the bitmap directory (specification, "Bitmap directory").
public struct BitmapEntry: Sendable, Hashable {
    /// Host offset of the bitmap table.
    public var tableOffset: UInt64
    /// Entries of 8 bytes of the bitmap table.
    public var tableEntryCount: UInt32
    /// Bit 0: in use; bit 1: auto; bit 2: usable although the extra data is unknown.
    public var flags: UInt32
    /// 1: a dirty tracking bitmap.
    public var type: UInt8
    /// A bit stands for `1 << granularityBits` bytes.
    public var granularityBits: UInt8
    /// The name as it is stored: UTF-8 by convention, any bytes in fact.
    public var nameBytes: [UInt8]
    /// Extra data as stored, kept on every rewrite.
    public var extraData: [UInt8]
    /// Where the entry starts in the directory, in bytes.
    package var directoryOffset: Int

    package static let inUse: UInt32 = 1 << 0
    package static let auto: UInt32 = 1 << 1
    /// The bitmap may be used although the extra data is not understood.
    package static let extraDataCompatible: UInt32 = 1 << 2
    /// The type of bitmaps that track what was written, the only one that there is.
    package static let dirtyTracking: UInt8 = 1
    /// Bytes of an entry before its extra data.
    private static let fixedByteCount = 24
    /// Where the flags stand in an entry, in bytes.
    package static let flagsOffset = 12

    /// The name for people; bytes that are no UTF-8 are replaced in it.
    public var name: String { String(decoding: nameBytes, as: UTF8.self) }

    /// The bitmap was not closed well: its content means nothing.
    public var isInUse: Bool { flags & BitmapEntry.inUse != 0 }
    /// The bitmap records every write.
    public var isAuto: Bool { flags & BitmapEntry.auto != 0 }

    /// Whether its marks mean what we take them for: no unknown type, flag or extra data.
    public var isUnderstood: Bool {
        let known = BitmapEntry.inUse | BitmapEntry.auto | BitmapEntry.extraDataCompatible
        return type == BitmapEntry.dirtyTracking && flags & ~known == 0
            && (extraData.isEmpty || flags & BitmapEntry.extraDataCompatible != 0)
    }

    /// Whether a disk of `byteCount` bytes has a bitmap with a table of this length.
    func fits(diskByteCount: UInt64, clusterBits: UInt32) -> Bool {
        UInt64(tableEntryCount)
            == BitmapEntry.tableEntryCount(
                diskByteCount: diskByteCount, granularityBits: granularityBits,
                clusterBits: clusterBits)
    }

    /// Entries of the table that a disk needs: a cluster each of bits that are `granularityBits`
    /// of bytes each (9…31).
    package static func tableEntryCount(
        diskByteCount: UInt64, granularityBits: UInt8, clusterBits: UInt32
    ) -> UInt64 {
        // The shift is 21…55.
        let bits = UInt64(granularityBits) &+ 3 &+ UInt64(clusterBits)
        return diskByteCount &>> bits &+ (diskByteCount & (1 &<< bits &- 1) == 0 ? 0 : 1)
    }

    /// Whether the bitmap of a disk of `byteCount` bytes is within the format's limits.
    package static func isAllowed(
        diskByteCount: UInt64, granularityBits: UInt8, clusterBits: UInt32
    ) -> Bool {
        let count = tableEntryCount(
            diskByteCount: diskByteCount, granularityBits: granularityBits,
            clusterBits: clusterBits)
        return count <= Limits.bitmapByteCount &>> UInt64(clusterBits)
    }

    /// Parses a whole directory of `count` entries.
    package static func parseDirectory(
        _ bytes: UnsafeRawBufferPointer, count: Int, clusterByteCount: UInt64
    ) throws(FormatError) -> [BitmapEntry] {
        var entries: [BitmapEntry] = []
        var names: Set<[UInt8]> = []
        var offset = 0
        for _ in 0..<count {
            let (entry, length) = try parseEntry(bytes, at: offset)
            try entry.check(clusterByteCount: clusterByteCount)
            guard names.insert(entry.nameBytes).inserted else {
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
            nameBytes: Array(bytes[nameStart..<end]),
            extraData: Array(bytes[offset &+ 24..<nameStart]), directoryOffset: offset)
        return (entry, end &- offset)
    }

    private func check(clusterByteCount: UInt64) throws(FormatError) {
        guard (1...Limits.bitmapNameByteCount).contains(UInt64(nameBytes.count)) else {
            throw .outOfRange(
                "length of a bitmap's name", value: UInt64(nameBytes.count), allowed: "1 to 1023")
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
        guard UInt64(tableEntryCount) &* clusterByteCount <= Limits.bitmapByteCount else {
            throw .tooLarge(
                "table of bitmap '\(name)'", value: UInt64(tableEntryCount),
                limit: Limits.bitmapByteCount / clusterByteCount)
        }
    }
}

// MARK: - Bytes of a directory

extension BitmapEntry {
    /// The bytes of a directory with `entries`, in their order.
    package static func encodeDirectory(_ entries: [BitmapEntry]) -> [UInt8] {
        entries.reduce(into: []) { $0 += $1.encoded() }
    }

    private func encoded() -> [UInt8] {
        let byteCount = BitmapEntry.fixedByteCount + extraData.count + nameBytes.count
        var bytes = [UInt8](repeating: 0, count: BitmapEntry.fixedByteCount)
        bytes.storeBigEndian(tableOffset, at: 0)
        bytes.storeBigEndian(tableEntryCount, at: 8)
        bytes.storeBigEndian(flags, at: BitmapEntry.flagsOffset)
        bytes[16] = type
        bytes[17] = granularityBits
        bytes.storeBigEndian(UInt16(truncatingIfNeeded: nameBytes.count), at: 18)
        bytes.storeBigEndian(UInt32(truncatingIfNeeded: extraData.count), at: 20)
        let padding = [UInt8](repeating: 0, count: (8 - byteCount % 8) % 8)
        return bytes + extraData + nameBytes + padding
    }
}

/// One entry of a bitmap table.
///
/// | bits  | meaning                                                                    |
/// |-------|----------------------------------------------------------------------------|
/// | 0     | without an offset: the bits of this part are all ones (0: all zeros)       |
/// | 9–55  | host offset of a cluster of bits, aligned; 0: none                         |
/// | else  | reserved, 0                                                                |
package struct BitmapTableEntry: Equatable, Sendable {
    package var bits: UInt64

    package init(bits: UInt64) { self.bits = bits }
    package init(clusterAt offset: UInt64) { bits = offset }

    package static let zeros = BitmapTableEntry(bits: 0)
    package static let ones = BitmapTableEntry(bits: 1)

    /// Where the cluster lies; 0 where there is none.
    package var offset: UInt64 { bits & 0x00ff_ffff_ffff_fe00 }

    package func isValid(clusterByteCount: UInt64) -> Bool {
        self == .ones || bits == offset && offset & (clusterByteCount &- 1) == 0
    }
}
