/// A header extension: type, data, kept verbatim whether it is known or not.
public struct HeaderExtension: Sendable, Hashable {
    /// Which extension it is.
    public var type: UInt32
    /// The data as stored, without its padding to a multiple of 8 bytes.
    public var data: [UInt8]

    /// An extension of any type.
    public init(type: UInt32, data: [UInt8]) {
        self.type = type
        self.data = data
    }

    /// The end of the extensions.
    public static let end: UInt32 = 0
    /// The format of the backing file, as a string.
    public static let backingFormat: UInt32 = 0xE279_2ACA
    /// The feature name table.
    public static let featureNames: UInt32 = 0x6803_F857
    /// The bitmaps extension.
    public static let bitmaps: UInt32 = 0x2385_2875
    /// The full disk encryption header pointer.
    public static let encryptionHeader: UInt32 = 0x0537_BE77
    /// The name of the external data file, as a string.
    public static let externalDataFile: UInt32 = 0x4441_5441
    /// Ours: room that a removed extension has left between others.
    static let unused: UInt32 = 0x5155_4e55

    /// What the specification calls an extension of this type; nil for one that it does not know.
    public var typeName: String? {
        switch type {
        case Self.backingFormat: "backing file format"
        case Self.featureNames: "feature name table"
        case Self.bitmaps: "bitmaps"
        case Self.encryptionHeader: "full disk encryption header pointer"
        case Self.externalDataFile: "external data file name"
        default: nil
        }
    }

    /// Types of which the format knows at most one in a header.
    static let unique: Set<UInt32> = [
        backingFormat, featureNames, bitmaps, encryptionHeader, externalDataFile,
    ]

    /// The extensions in `area`, which starts after the header's fixed part and ends where the
    /// backing file's name or the first cluster's end is (specification, "Header extensions").
    static func parse(_ area: UnsafeRawBufferPointer) throws(FormatError) -> [HeaderExtension] {
        var found: [HeaderExtension] = []
        var offset = 0
        while offset < area.count {
            guard let type = area.bigEndian(at: offset, as: UInt32.self),
                let length = area.bigEndian(at: offset &+ 4, as: UInt32.self)
            else {
                throw .truncated("header extension", needed: 8, found: UInt64(area.count &- offset))
            }
            let start = offset &+ 8
            let byteCount = Int(length)  // 32 bits always fit
            guard byteCount <= area.count &- start else {
                throw .truncated(
                    "header extension \(hex(UInt64(type)))", needed: UInt64(length),
                    found: UInt64(area.count &- start))
            }
            if type == end { break }
            if unique.contains(type), found.contains(where: { $0.type == type }) {
                throw .inconsistent("header extension \(hex(UInt64(type))) appears twice")
            }
            found.append(HeaderExtension(type: type, data: Array(area[start..<start &+ byteCount])))
            offset = start &+ (byteCount &+ 7) & ~7
        }
        return found
    }
}

/// The bitmaps extension: where the bitmap directory is.
public struct BitmapsExtension: Sendable, Hashable {
    /// Bitmaps in the directory.
    public var count: UInt32
    /// Bytes of the directory.
    public var directoryByteCount: UInt64
    /// Host offset of the directory.
    public var directoryOffset: UInt64

    init(_ data: [UInt8], clusterByteCount: UInt64) throws(FormatError) {
        guard data.count == 24 else {
            throw .outOfRange(
                "bitmaps extension's length", value: UInt64(data.count), allowed: "24")
        }
        let (count, reserved, byteCount, offset) = data.withUnsafeBytes {
            (
                $0.bigEndian(at: 0, as: UInt32.self) ?? 0,
                $0.bigEndian(at: 4, as: UInt32.self) ?? 0,
                $0.bigEndian(at: 8, as: UInt64.self) ?? 0,
                $0.bigEndian(at: 16, as: UInt64.self) ?? 0
            )
        }
        guard (1...Limits.bitmapCount).contains(UInt64(count)) else {
            throw .outOfRange("number of bitmaps", value: UInt64(count), allowed: "1 to 65535")
        }
        guard reserved == 0 else {
            throw .outOfRange(
                "bitmaps extension's reserved field", value: UInt64(reserved), allowed: "0")
        }
        guard byteCount <= Limits.bitmapDirectoryByteCount else {
            throw .tooLarge(
                "bitmap directory", value: byteCount, limit: Limits.bitmapDirectoryByteCount)
        }
        guard offset & (clusterByteCount &- 1) == 0, offset < Limits.hostOffset else {
            throw .misaligned("bitmap directory", offset: offset, alignment: clusterByteCount)
        }
        self.count = count
        directoryByteCount = byteCount
        directoryOffset = offset
    }
}

extension BitmapsExtension {
    package init(count: UInt32, directoryByteCount: UInt64, directoryOffset: UInt64) {
        self.count = count
        self.directoryByteCount = directoryByteCount
        self.directoryOffset = directoryOffset
    }

    /// Bytes of the extension's data.
    package static let byteCount = 24
    /// Where the directory's offset stands in the data, in bytes.
    package static let directoryOffsetField = 16

    package var encoded: [UInt8] {
        var data = [UInt8](repeating: 0, count: BitmapsExtension.byteCount)
        data.storeBigEndian(count, at: 0)
        data.storeBigEndian(directoryByteCount, at: 8)
        data.storeBigEndian(directoryOffset, at: 16)
        return data
    }
}
