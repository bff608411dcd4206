/// A reader of qcow2 files that shares no code with the engine: header, tables, counts.
///
/// It judges images for the tests, so it is slow, plain, and never imports the engine.  The bytes
/// belong to the caller and must outlive the reader; what lies past them counts as zeros.
package struct ReferenceReader {
    /// What is wrong with an image.
    package struct Fault: Error, CustomStringConvertible {
        package let description: String
        package init(_ description: String) { self.description = description }
    }

    package struct Snapshot: Sendable {
        package let id: String
        package let name: String
        package let table: L1Table
        /// Bytes of the disk when it was taken; nil where the entry does not say.
        package let byteCount: Int?
        package let extra: [UInt8]
    }

    /// Where an L1 table lies, and whether its COPIED flags mean anything.
    package struct L1Table: Sendable {
        package let offset: Int
        package let entryCount: Int
        package let isActive: Bool
    }

    package struct Extension: Sendable {
        package let type: UInt32
        package let data: [UInt8]
    }

    /// What an L2 entry says.
    package enum Entry: Equatable {
        case unallocated
        case zeroPlain
        case zeroAllocated(Int)
        case normal(Int)
        /// Where the stream starts, and how many bytes it has at most.
        case compressed(Int, byteCount: Int)
    }

    package let bytes: UnsafeRawBufferPointer
    /// The external data file; nil where guest data lies in `bytes`.
    package let dataFile: UnsafeRawBufferPointer?
    /// Keeps the bytes alive where they are a file's mapping.
    private let owner: AnyObject?
    package let version: UInt32
    package let clusterBits: Int
    package let byteCount: Int
    /// Whether guest data is: without `cipher` this reader sees the metadata alone.
    package let isEncrypted: Bool
    package let cipher: ReferenceCipher?
    package let active: L1Table
    package let refcountTableOffset: Int
    package let refcountTableClusters: Int
    package let snapshotCount: Int
    package let snapshotsOffset: Int
    package let incompatibleFeatures: UInt64
    package let compatibleFeatures: UInt64
    package let autoclearFeatures: UInt64
    package let refcountOrder: Int
    package let headerLength: Int
    package let compressionType: UInt8
    package let backingName: String?

    package var clusterSize: Int { 1 << clusterBits }
    package var refcountBits: Int { 1 << refcountOrder }
    package var entriesPerTable: Int { clusterSize / 8 }
    /// Whether an L2 entry has a second word, for 32 subclusters.
    package var isExtended: Bool { incompatibleFeatures & 16 != 0 }
    package var entrySize: Int { isExtended ? 16 : 8 }
    package var entriesPerL2Table: Int { clusterSize / entrySize }
    package var fileClusterCount: Int { (bytes.count + clusterSize - 1) / clusterSize }

    static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00
    static let copied: UInt64 = 1 << 63

    package init(
        _ bytes: UnsafeRawBufferPointer, dataFile: UnsafeRawBufferPointer? = nil,
        owner: AnyObject? = nil, cipher: ReferenceCipher? = nil
    ) throws(Fault) {
        func field<Number: FixedWidthInteger>(_ offset: Int, _: Number.Type) -> Number {
            bytes.number(at: offset, as: Number.self)
        }
        func offset(_ position: Int) throws(Fault) -> Int {
            guard let offset = Int(exactly: field(position, UInt64.self)), offset < 1 << 56 else {
                throw Fault("the header's offset at byte \(position) is absurd")
            }
            return offset
        }
        self.bytes = bytes
        self.dataFile = dataFile
        self.owner = owner
        self.cipher = cipher
        guard bytes.count >= 72, field(0, UInt32.self) == 0x5146_49fb else {
            throw Fault("no qcow2 magic")
        }
        version = field(4, UInt32.self)
        guard version == 2 || version == 3 else { throw Fault("version \(version)") }
        clusterBits = Int(field(20, UInt32.self))
        guard (9...21).contains(clusterBits) else { throw Fault("cluster bits \(clusterBits)") }
        byteCount = try offset(24) / 512 * 512
        isEncrypted = field(32, UInt32.self) != 0
        active = L1Table(
            offset: try offset(40), entryCount: Int(field(36, UInt32.self)), isActive: true)
        refcountTableOffset = try offset(48)
        refcountTableClusters = Int(field(56, UInt32.self))
        snapshotCount = Int(field(60, UInt32.self))
        snapshotsOffset = try offset(64)
        let isNew = version == 3
        incompatibleFeatures = isNew ? field(72, UInt64.self) : 0
        compatibleFeatures = isNew ? field(80, UInt64.self) : 0
        autoclearFeatures = isNew ? field(88, UInt64.self) : 0
        refcountOrder = isNew ? Int(field(96, UInt32.self)) : 4
        headerLength = isNew ? Int(field(100, UInt32.self)) : 72
        compressionType = isNew && headerLength > 104 ? field(104, UInt8.self) : 0
        guard refcountOrder <= 6 else { throw Fault("refcount order \(refcountOrder)") }
        guard incompatibleFeatures & ~0b11111 == 0 else {
            throw Fault("incompatible features \(incompatibleFeatures) are not read here")
        }
        guard (incompatibleFeatures & 4 != 0) == (dataFile != nil) else {
            throw Fault("the image and its external data file go together")
        }
        guard active.entryCount <= 4 << 20, refcountTableClusters << clusterBits <= 8 << 20,
            snapshotCount <= 65536
        else { throw Fault("a table of the header is too large") }
        let nameOffset = try offset(8)
        let nameLength = Int(field(16, UInt32.self))
        if nameOffset == 0 {
            backingName = nil
        } else {
            guard nameOffset + nameLength <= 1 << clusterBits, nameLength <= 1023 else {
                throw Fault("the backing file's name leaves the header cluster")
            }
            backingName = String(
                decoding: (0..<nameLength).map { field(nameOffset + $0, UInt8.self) },
                as: UTF8.self)
        }
    }

    package func number(_ offset: Int) -> UInt64 { bytes.number(at: offset, as: UInt64.self) }

    /// The header extensions in their order.
    package func extensions() throws(Fault) -> [Extension] {
        var extensions: [Extension] = []
        var position = headerLength
        let nameOffset = Int(truncatingIfNeeded: number(8))
        let end = nameOffset > 0 ? nameOffset : clusterSize
        while position + 8 <= end {
            let type = bytes.number(at: position, as: UInt32.self)
            let length = Int(bytes.number(at: position + 4, as: UInt32.self))
            if type == 0 { break }
            guard position + 8 + length <= end else {
                throw Fault("extension \(type) leaves the header cluster")
            }
            let data = (0..<length).map { bytes.number(at: position + 8 + $0, as: UInt8.self) }
            extensions.append(Extension(type: type, data: data))
            position += 8 + (length + 7) / 8 * 8
        }
        return extensions
    }

    /// The snapshot table, and how many bytes it takes.
    package func snapshots() throws(Fault) -> (entries: [Snapshot], byteCount: Int) {
        var position = snapshotsOffset
        var entries: [Snapshot] = []
        for _ in 0..<snapshotCount {
            position = (position - snapshotsOffset + 7) / 8 * 8 + snapshotsOffset
            let offset = Int(truncatingIfNeeded: number(position))
            let entryCount = Int(bytes.number(at: position + 8, as: UInt32.self))
            let idLength = Int(bytes.number(at: position + 12, as: UInt16.self))
            let nameLength = Int(bytes.number(at: position + 14, as: UInt16.self))
            let extraLength = Int(bytes.number(at: position + 36, as: UInt32.self))
            guard extraLength <= 1024, entryCount <= 4 << 20 else {
                throw Fault("a snapshot entry at \(position) is too large")
            }
            let extra = raw(position + 40, extraLength)
            let id = position + 40 + extraLength
            entries.append(
                Snapshot(
                    id: String(decoding: raw(id, idLength), as: UTF8.self),
                    name: String(decoding: raw(id + idLength, nameLength), as: UTF8.self),
                    table: L1Table(offset: offset, entryCount: entryCount, isActive: false),
                    byteCount: extraLength >= 16
                        ? Int(truncatingIfNeeded: extra.number(at: 8, as: UInt64.self)) : nil,
                    extra: extra))
            position = id + idLength + nameLength
        }
        return (entries, position - snapshotsOffset)
    }

    func raw(_ offset: Int, _ count: Int) -> [UInt8] {
        (0..<count).map { bytes.number(at: offset + $0, as: UInt8.self) }
    }

    /// The count of host cluster `cluster` as the file has it.
    package func refcount(of cluster: Int) -> UInt64 {
        let perBlock = clusterSize * 8 / refcountBits
        let index = cluster / perBlock
        guard index < refcountTableClusters * entriesPerTable else { return 0 }
        let block = Int(truncatingIfNeeded: number(refcountTableOffset + index * 8) & ~0x1ff)
        return block == 0 ? 0 : counter(cluster % perBlock, in: block)
    }

    /// Counter `index` of the refcount block at `block`; below a byte the lowest bits come first.
    func counter(_ index: Int, in block: Int) -> UInt64 {
        switch refcountOrder {
        case 0, 1, 2:
            let bit = index * refcountBits
            let byte = bytes.number(at: block + bit / 8, as: UInt8.self)
            return UInt64(byte >> (bit % 8)) & ((1 << refcountBits) - 1)
        case 3: return UInt64(bytes.number(at: block + index, as: UInt8.self))
        case 4: return UInt64(bytes.number(at: block + index * 2, as: UInt16.self))
        case 5: return UInt64(bytes.number(at: block + index * 4, as: UInt32.self))
        default: return bytes.number(at: block + index * 8, as: UInt64.self)
        }
    }
}

/// `number` as programmers write it.
package func hex(_ number: some FixedWidthInteger) -> String {
    "0x" + String(number, radix: 16)
}
