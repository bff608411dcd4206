/// The header of an image, with its extensions, checked as far as it can be checked alone.
///
/// Offsets are host offsets in bytes.  A value of this type has passed every check of the
/// specification's "Header" that concerns one number or two; what needs the file's length, the
/// tables or other files is checked by whoever reads those.
public struct Header: Sendable, Hashable {
    /// `QFI` and 0xfb, the first four bytes of every image.
    public static let magic: UInt32 = 0x5146_49fb
    /// Bytes of a version 2 header, and of version 3's oldest form.
    static let byteCountV2: UInt32 = 72
    static let byteCountV3: UInt32 = 104

    /// 2 or 3.
    public var version: UInt32
    /// Host offset of the backing file's name; 0 without one.
    public var backingFileOffset: UInt64
    /// Bytes of the backing file's name, 1023 at most.
    public var backingFileByteCount: UInt32
    /// A cluster has `1 << clusterBits` bytes: 9 to 21.
    public var clusterBits: UInt32
    /// Bytes of the virtual disk, as stored.
    public var size: UInt64
    /// 0 none, 1 AES, 2 LUKS.
    public var encryptionMethod: UInt32
    /// Entries of 8 bytes of the active L1 table.
    public var l1EntryCount: UInt32
    /// Host offset of the active L1 table, a multiple of the cluster size.
    public var l1Offset: UInt64
    /// Host offset of the refcount table, a multiple of the cluster size.
    public var refcountTableOffset: UInt64
    /// Clusters of the refcount table.
    public var refcountTableClusterCount: UInt32
    /// Internal snapshots in the snapshot table.
    public var snapshotCount: UInt32
    /// Host offset of the snapshot table; without meaning where there are no snapshots.
    public var snapshotsOffset: UInt64
    /// What a program has to know to read the image; none in version 2.
    public var incompatibleFeatures: IncompatibleFeatures = []
    /// What a program may ignore; none in version 2.
    public var compatibleFeatures: CompatibleFeatures = []
    /// What a program clears that writes without knowing it; none in version 2.
    public var autoclearFeatures: AutoclearFeatures = []
    /// A refcount has `1 << refcountOrder` bits.
    public var refcountOrder: UInt32 = 4
    /// Bytes of the fixed part.
    public var byteCount: UInt32 = Header.byteCountV2
    /// How compressed clusters are compressed; deflate where the field is missing.
    public var compressionType: CompressionType = .deflate
    /// The name of the backing file as stored, nil without one.
    public var backingFile: String?
    /// All header extensions in their order, the end marker left out.
    public var extensions: [HeaderExtension] = []
    /// Where the bitmap directory is; nil without bitmaps.
    public var bitmaps: BitmapsExtension?
    /// What a version 3 header has behind the fields that are known, kept verbatim.
    public var unknownFields: [UInt8] = []
    /// The backing file's name as it was parsed: it need not be UTF-8.
    var backingFileBytes: [UInt8] = []
    /// Where the LUKS header is; nil without one.
    public var encryption: EncryptionExtension?

    /// Bytes of a cluster.
    public var clusterByteCount: UInt64 { 1 &<< UInt64(clusterBits) }
    /// Bits of a refcount.
    public var refcountBits: Int { 1 &<< Int(refcountOrder) }
    /// How many clusters a refcount block counts, as a power of two.
    var refcountBlockBits: UInt64 { UInt64(clusterBits) &+ 3 &- UInt64(refcountOrder) }
    /// Bytes of an L2 entry.
    public var l2EntryByteCount: UInt64 {
        incompatibleFeatures.contains(.extendedL2) ? 16 : 8
    }
    /// Bytes of the virtual disk as clients see them: a multiple of 512.
    public var virtualByteCount: UInt64 { size & ~511 }

    /// The backing format named by its extension, nil without one.
    public var backingFormat: String? {
        extensions.first { $0.type == HeaderExtension.backingFormat }
            .map { String(decoding: $0.data, as: UTF8.self) }
    }

    /// Whether guest data lies in an external data file.
    public var hasDataFile: Bool { incompatibleFeatures.contains(.externalDataFile) }
    /// Whether that file alone is a raw image of the disk.
    public var hasRawDataFile: Bool {
        hasDataFile && autoclearFeatures.contains(.rawExternalData)
    }
    /// The name of the external data file as stored; nil without one, or where it is not named.
    public var dataFileName: String? {
        guard hasDataFile else { return nil }
        return extensions.first { $0.type == HeaderExtension.externalDataFile }
            .map { String(decoding: $0.data, as: UTF8.self) }
    }

    /// How many bytes of the file `parse` wants to see, from its first 24 or more.
    /// - Throws: `.notQCOW2`, or what is wrong with the version or the cluster size.
    static func neededByteCount(_ bytes: UnsafeRawBufferPointer) throws(FormatError) -> Int {
        guard bytes.bigEndian(at: 0, as: UInt32.self) == magic else { throw .notQCOW2 }
        guard let clusterBits = bytes.bigEndian(at: 20, as: UInt32.self) else {
            throw .truncated("header", needed: 72, found: UInt64(bytes.count))
        }
        guard Limits.clusterBits.contains(clusterBits) else {
            throw .outOfRange("cluster_bits", value: UInt64(clusterBits), allowed: "9 to 21")
        }
        return 1 &<< Int(clusterBits)
    }

    /// Parses the first cluster of an image; `bytes` may be shorter where the file is.
    ///
    /// A version other than 2 and 3 throws `.outOfRange("version", …)`, a compression type that
    /// nobody knows `.outOfRange("compression_type", …)`: the opener turns both into a refusal by
    /// name.  Unknown incompatible features do not throw; `unknownIncompatibleFeatures` has them.
    package static func parse(_ bytes: UnsafeRawBufferPointer) throws(FormatError) -> Header {
        guard bytes.bigEndian(at: 0, as: UInt32.self) == magic else { throw .notQCOW2 }
        guard bytes.count >= Int(byteCountV2) else {
            throw .truncated("header", needed: UInt64(byteCountV2), found: UInt64(bytes.count))
        }
        var header = Header(fixedPart: bytes)
        guard header.version == 2 || header.version == 3 else {
            throw .outOfRange("version", value: UInt64(header.version), allowed: "2 and 3")
        }
        guard Limits.clusterBits.contains(header.clusterBits) else {
            throw .outOfRange("cluster_bits", value: UInt64(header.clusterBits), allowed: "9 to 21")
        }
        if header.version == 3 { try header.parseVersion3Fields(bytes) }
        try header.parseBackingName(bytes)
        try header.parseExtensions(bytes)
        try header.checkFeatures()
        try header.checkTables()
        return header
    }

    /// Incompatible features that nobody here knows: names from the feature name table, and the
    /// bits that it does not name.
    var unknownIncompatibleFeatures: (names: [String], bits: UInt64) {
        var bits = incompatibleFeatures.subtracting(.known).rawValue
        var names: [String] = []
        let table = extensions.first { $0.type == HeaderExtension.featureNames }?.data ?? []
        for start in stride(from: 0, to: table.count - table.count % 48, by: 48) {
            guard table[start] == 0, table[start + 1] < 64,
                bits & 1 << UInt64(table[start + 1]) != 0
            else { continue }
            bits &= ~(1 << UInt64(table[start + 1]))
            names.append(
                String(
                    decoding: table[start + 2..<start + 48].prefix { $0 != 0 }, as: UTF8.self))
        }
        return (names, bits)
    }
}

// MARK: - Parsing, in the order of the bytes

extension Header {
    /// The fields of both versions; `bytes` are at least 72.
    init(fixedPart bytes: UnsafeRawBufferPointer) {
        func u32(_ offset: Int) -> UInt32 { bytes.bigEndian(at: offset) ?? 0 }
        func u64(_ offset: Int) -> UInt64 { bytes.bigEndian(at: offset) ?? 0 }
        version = u32(4)
        backingFileOffset = u64(8)
        backingFileByteCount = u32(16)
        clusterBits = u32(20)
        size = u64(24)
        encryptionMethod = u32(32)
        l1EntryCount = u32(36)
        l1Offset = u64(40)
        refcountTableOffset = u64(48)
        refcountTableClusterCount = u32(56)
        snapshotCount = u32(60)
        snapshotsOffset = u64(64)
    }

    mutating func parseVersion3Fields(_ bytes: UnsafeRawBufferPointer) throws(FormatError) {
        guard let incompatible = bytes.bigEndian(at: 72, as: UInt64.self),
            let compatible = bytes.bigEndian(at: 80, as: UInt64.self),
            let autoclear = bytes.bigEndian(at: 88, as: UInt64.self),
            let order = bytes.bigEndian(at: 96, as: UInt32.self),
            let length = bytes.bigEndian(at: 100, as: UInt32.self)
        else { throw .truncated("header", needed: 104, found: UInt64(bytes.count)) }
        guard length >= Header.byteCountV3, UInt64(length) <= clusterByteCount else {
            throw .outOfRange(
                "header_length", value: UInt64(length), allowed: "104 to \(clusterByteCount)")
        }
        guard length % 8 == 0 else {
            throw .outOfRange("header_length", value: UInt64(length), allowed: "multiples of 8")
        }
        guard Limits.refcountOrder.contains(order) else {
            throw .outOfRange("refcount_order", value: UInt64(order), allowed: "0 to 6")
        }
        incompatibleFeatures = IncompatibleFeatures(rawValue: incompatible)
        compatibleFeatures = CompatibleFeatures(rawValue: compatible)
        autoclearFeatures = AutoclearFeatures(rawValue: autoclear)
        refcountOrder = order
        byteCount = length
        guard length > 104 else { return }
        guard let type = bytes.bigEndian(at: 104, as: UInt8.self) else {
            throw .truncated("header", needed: UInt64(length), found: UInt64(bytes.count))
        }
        let end = min(Int(length), bytes.count)
        unknownFields = Array(bytes[min(Int(Header.writtenByteCountV3), end)..<end])
        guard let known = CompressionType(rawValue: type) else {
            throw .outOfRange(
                "compression_type", value: UInt64(type), allowed: "0 (deflate), 1 (zstd)")
        }
        compressionType = known
    }

    mutating func parseBackingName(_ bytes: UnsafeRawBufferPointer) throws(FormatError) {
        guard backingFileOffset != 0 else { return }
        guard backingFileOffset <= clusterByteCount, backingFileOffset >= UInt64(byteCount) else {
            throw .outOfRange(
                "backing_file_offset", value: backingFileOffset,
                allowed: "\(byteCount) to \(clusterByteCount)")
        }
        let room = clusterByteCount &- backingFileOffset
        let nameByteCount = UInt64(backingFileByteCount)
        guard nameByteCount <= min(Limits.backingNameByteCount, room) else {
            throw .tooLarge(
                "backing file's name", value: nameByteCount,
                limit: min(Limits.backingNameByteCount, room))
        }
        let start = Int(backingFileOffset)  // at most a cluster
        let end = start &+ Int(nameByteCount)
        guard end <= bytes.count else {
            throw .truncated("backing file's name", needed: UInt64(end), found: UInt64(bytes.count))
        }
        backingFileBytes = Array(bytes[start..<end])
        backingFile = end == start ? nil : String(decoding: bytes[start..<end], as: UTF8.self)
    }

    mutating func parseExtensions(_ bytes: UnsafeRawBufferPointer) throws(FormatError) {
        let start = min(Int(byteCount), bytes.count)
        // Nobody has looked yet at what a damaged header says of the name.
        let name = backingFileOffset == 0 ? clusterByteCount : backingFileOffset
        let end = max(min(Int(min(name, clusterByteCount)), bytes.count), start)
        extensions = try HeaderExtension.parse(UnsafeRawBufferPointer(rebasing: bytes[start..<end]))
        if let format = extensions.first(where: { $0.type == HeaderExtension.backingFormat }),
            format.data.count > Limits.backingFormatByteCount
        {
            throw .tooLarge(
                "backing format's name", value: UInt64(format.data.count),
                limit: UInt64(Limits.backingFormatByteCount))
        }
        if let found = extensions.first(where: { $0.type == HeaderExtension.bitmaps }) {
            bitmaps = try BitmapsExtension(found.data, clusterByteCount: clusterByteCount)
        }
        if let found = extensions.first(where: { $0.type == HeaderExtension.encryptionHeader }) {
            encryption = try EncryptionExtension(found.data, clusterByteCount: clusterByteCount)
        }
    }
}

// MARK: - What must agree

extension Header {
    private func checkFeatures() throws(FormatError) {
        guard incompatibleFeatures.contains(.compressionType) == (compressionType != .deflate)
        else {
            throw .inconsistent(
                "the compression type (\(compressionType.rawValue)) and its feature bit disagree"
            )
        }
        if incompatibleFeatures.contains(.extendedL2),
            !Limits.clusterBitsWithExtendedL2.contains(clusterBits)
        {
            throw .outOfRange(
                "cluster_bits with extended L2 entries", value: UInt64(clusterBits),
                allowed: "14 to 21")
        }
        guard encryptionMethod <= 2 else {
            throw .outOfRange("crypt_method", value: UInt64(encryptionMethod), allowed: "0, 1, 2")
        }
        guard (encryptionMethod == 2) == (encryption != nil) else {
            throw .inconsistent(
                "the LUKS header extension and crypt_method \(encryptionMethod) disagree")
        }
        if autoclearFeatures.contains(.rawExternalData),
            !incompatibleFeatures.contains(.externalDataFile)
        {
            throw .inconsistent(
                "marked as having a raw external data file, but it has no data file")
        }
    }

    private func checkTables() throws(FormatError) {
        guard size <= Limits.virtualByteCount else {
            throw .tooLarge("virtual size", value: size, limit: Limits.virtualByteCount)
        }
        try checkTable(
            "L1 table", at: l1Offset, byteCount: UInt64(l1EntryCount) &* 8,
            limit: Limits.l1ByteCount)
        // The bytes behind the last whole sector count here, although no guest sees them.
        let l1EntriesNeeded = l1EntryCountNeeded(for: size)
        guard UInt64(l1EntryCount) >= l1EntriesNeeded else {
            throw .inconsistent(
                "the L1 table has \(l1EntryCount) entries, "
                    + "a disk of \(size) bytes needs \(l1EntriesNeeded)")
        }
        guard refcountTableClusterCount >= 1 else {
            throw .outOfRange("refcount_table_clusters", value: 0, allowed: "1 or more")
        }
        try checkTable(
            "refcount table", at: refcountTableOffset,
            byteCount: UInt64(refcountTableClusterCount) &* clusterByteCount,  // 32 + 21 bits
            limit: Limits.refcountTableByteCount)
        guard UInt64(snapshotCount) <= Limits.snapshotCount else {
            throw .tooLarge(
                "number of snapshots", value: UInt64(snapshotCount), limit: Limits.snapshotCount)
        }
        try checkTable("snapshot table", at: snapshotsOffset, byteCount: 0, limit: 0)
    }

    private func checkTable(
        _ name: String, at offset: UInt64, byteCount: UInt64, limit: UInt64
    ) throws(FormatError) {
        guard byteCount <= limit else { throw .tooLarge(name, value: byteCount, limit: limit) }
        guard offset & (clusterByteCount &- 1) == 0 else {
            throw .misaligned(name, offset: offset, alignment: clusterByteCount)
        }
        guard offset <= Limits.hostOffset &- byteCount else {
            throw .tooLarge("offset of the \(name)", value: offset, limit: Limits.hostOffset)
        }
    }

    /// L1 entries that a disk of `byteCount` bytes needs.
    package func l1EntryCountNeeded(for byteCount: UInt64) -> UInt64 {
        // At most 39.
        let coverageBits = UInt64(clusterBits) &* 2 &- (l2EntryByteCount == 16 ? 4 : 3)
        return byteCount &>> coverageBits &+ (byteCount & (1 &<< coverageBits &- 1) == 0 ? 0 : 1)
    }
}
