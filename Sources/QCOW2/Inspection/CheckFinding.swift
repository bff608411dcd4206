/// Something in an image that is not as it should be.
public enum CheckFinding: Sendable, Equatable {
    /// What a structure is part of.
    public enum Owner: Sendable, Equatable {
        /// The disk as it is now.
        case active
        /// An internal snapshot.
        case snapshot(id: String, name: String)
    }

    // Structures
    /// A snapshot that a power cut has left without its L1 table.
    case snapshotIncomplete(id: String, name: String)
    /// A snapshot whose L1 table cannot be right.
    case snapshotTable(id: String, name: String, FormatError)
    /// An L1 entry with bits set that should be 0.
    case l1EntryReserved(Owner, index: UInt64, entry: UInt64)
    /// An L1 entry that points into the middle of a cluster; `offset` is the host offset.
    case l2TableMisaligned(Owner, index: UInt64, offset: UInt64)
    /// An L2 entry with bits set that should be 0.
    case l2EntryReserved(entry: UInt64)
    /// An L2 entry of a compressed cluster with the COPIED flag, which it cannot have.
    case compressedAndCopied(entry: UInt64)
    /// A compressed cluster in an image with an external data file.
    case compressedWithDataFile(entry: UInt64)
    /// Snapshots in an image with an external data file.
    case snapshotsWithDataFile(count: UInt32)
    /// A compressed cluster with a bitmap of subclusters.
    case compressedWithBitmap(entry: UInt64, bitmap: UInt64)
    /// Subclusters that are allocated and zero at once.
    case subclustersClash(entry: UInt64, bitmap: UInt64)
    /// Allocated subclusters without a host cluster.
    case subclustersWithoutCluster(bitmap: UInt64)
    /// An L2 entry that points into the middle of a cluster.
    case dataMisaligned(entry: UInt64)
    /// The same of a cluster that reads as zeros.
    case zeroMisaligned(entry: UInt64)
    /// A bitmap directory that cannot be right.
    case bitmapDirectory(FormatError)
    /// A bitmap of an unknown type, with unknown flags or data: QEMU opens no image that has one.
    case bitmapNotUnderstood(name: String)
    /// A bitmap whose table is not as long as the disk needs it: QEMU opens no image that has one,
    /// unless the bitmap was not closed well.
    case bitmapLength(name: String, entryCount: UInt32)
    /// An entry of a bitmap table with bits set that should be 0.
    case bitmapEntryReserved(name: String, index: UInt64, entry: UInt64)
    /// Something that lies past the largest host offset; in bytes.
    case pastTheEnd(offset: UInt64, byteCount: UInt64)
    /// A cluster, by its number in the file, with more references than its count can hold.
    case countTooLarge(cluster: UInt64)

    // Reference counts
    /// An entry of the refcount table with bits set that should be 0.
    case refcountTableEntryReserved(index: UInt64, entry: UInt64)
    /// An entry of the refcount table that points into the middle of a cluster.
    case refcountBlockMisaligned(index: UInt64, offset: UInt64)
    /// A refcount block past the end of the file; `offset` is its host offset.
    case refcountBlockOutside(index: UInt64, offset: UInt64)
    /// A refcount block that is used `count` times.
    case refcountBlockShared(index: UInt64, count: UInt64)
    /// A cluster, by its number in the file, with more references than its count says.
    case countTooLow(cluster: UInt64, stored: UInt64, found: UInt64)
    /// A cluster, by its number in the file, with fewer references than its count says.
    case leak(cluster: UInt64, stored: UInt64, found: UInt64)

    // The COPIED flag
    /// An L1 entry whose COPIED flag does not fit the count of the L2 table.
    case l2TableCopied(index: UInt64, entry: UInt64, stored: UInt64)
    /// An L2 entry whose COPIED flag does not fit the count of the cluster.
    case clusterCopied(entry: UInt64, stored: UInt64)

    // What could not be examined
    /// A cluster whose refcount block, at host offset `block`, cannot be read.
    case unreadableCount(cluster: UInt64, block: UInt64)

    /// How bad a finding is.
    public enum Severity: Sendable {
        /// Data is damaged, or writing may damage it.
        case corruption
        /// Space is lost, nothing else.
        case leak
        /// The check is incomplete.
        case unchecked
    }

    /// How bad it is.
    public var severity: Severity {
        switch self {
        case .leak: .leak
        case .unreadableCount: .unchecked
        default: .corruption
        }
    }
}

extension CheckFinding {
    /// What a finding means for a repair.
    struct Obstacles: OptionSet {
        let rawValue: Int

        /// References that nobody can follow: what looks unused may be in use.
        static let hiddenReferences = Obstacles(rawValue: 1)
        /// The refcount table or a block cannot be used any more.
        static let brokenRefcounts = Obstacles(rawValue: 2)
        /// Entries of tables have bits that mean nothing.
        static let meaninglessBits = Obstacles(rawValue: 4)
    }

    var obstacles: Obstacles {
        switch self {
        case .snapshotTable, .l2TableMisaligned, .bitmapDirectory, .bitmapNotUnderstood,
            .bitmapEntryReserved:
            .hiddenReferences
        case .refcountTableEntryReserved, .refcountBlockMisaligned, .refcountBlockOutside,
            .refcountBlockShared, .unreadableCount:
            .brokenRefcounts
        case .l1EntryReserved, .l2EntryReserved, .compressedAndCopied, .zeroMisaligned:
            .meaninglessBits
        default: []
        }
    }
}

extension CheckFinding: CustomStringConvertible {
    /// One sentence that names places and numbers.
    public var description: String {
        switch self {
        case .snapshotIncomplete(let id, let name):
            "snapshot \(id) ('\(name)') lacks its disk size"
        case .snapshotTable(let id, let name, let error): "snapshot \(id) ('\(name)'): \(error)"
        case .l1EntryReserved(let owner, let index, let entry):
            "L1 entry \(index)\(owner) has reserved bits set (\(hex(entry)))"
        case .l2TableMisaligned(let owner, let index, let offset):
            "L1 entry \(index)\(owner) points inside a cluster (\(hex(offset)))"
        case .l2EntryReserved(let entry): "L2 entry \(hex(entry)) has reserved bits set"
        case .compressedAndCopied(let entry):
            "L2 entry \(hex(entry)) is compressed and marked COPIED"
        case .compressedWithDataFile(let entry):
            "L2 entry \(hex(entry)) is compressed, which an external data file excludes"
        case .snapshotsWithDataFile(let count):
            "\(count) snapshots, which an external data file excludes"
        case .compressedWithBitmap(let entry, let bitmap):
            "L2 entry \(hex(entry)) is compressed and has a subcluster bitmap (\(hex(bitmap)))"
        case .subclustersClash(let entry, let bitmap):
            "L2 entry \(hex(entry)): a subcluster is allocated and zero at once (\(hex(bitmap)))"
        case .subclustersWithoutCluster(let bitmap):
            "an L2 entry has allocated subclusters (\(hex(bitmap))) and no host cluster"
        case .dataMisaligned(let entry): "L2 entry \(hex(entry)) points inside a cluster"
        case .zeroMisaligned(let entry):
            "L2 entry \(hex(entry)) reads as zeros and points inside a cluster"
        case .bitmapDirectory(let error): "bitmap directory: \(error)"
        case .bitmapNotUnderstood(let name):
            "bitmap '\(name)' has a type, flags or data that nobody knows"
        case .bitmapLength(let name, let entryCount):
            "bitmap '\(name)': a table of \(entryCount) entries does not fit the disk"
        case .bitmapEntryReserved(let name, let index, let entry):
            "bitmap '\(name)': table entry \(index) makes no sense (\(hex(entry)))"
        case .pastTheEnd(let offset, let byteCount):
            "\(byteCount) bytes at \(hex(offset)) are referenced, past the end of the file"
        case .countTooLarge(let cluster):
            "cluster \(cluster) has more references than a refcount can say"
        default: countDescription
        }
    }

    private var countDescription: String {
        switch self {
        case .refcountTableEntryReserved(let index, let entry):
            "refcount table entry \(index) has reserved bits set (\(hex(entry)))"
        case .refcountBlockMisaligned(let index, let offset):
            "refcount block \(index) is not aligned to a cluster (\(hex(offset)))"
        case .refcountBlockOutside(let index, let offset):
            "refcount block \(index) lies outside of the file (\(hex(offset)))"
        case .refcountBlockShared(let index, let count):
            "refcount block \(index) is referenced \(count) times"
        case .countTooLow(let cluster, let stored, let found):
            "cluster \(cluster): refcount \(stored), referenced \(found) times"
        case .leak(let cluster, let stored, let found):
            "cluster \(cluster): refcount \(stored), referenced \(found) times (leaked)"
        case .l2TableCopied(let index, let entry, let stored):
            "L1 entry \(index) (\(hex(entry))): the COPIED flag is wrong for refcount \(stored)"
        case .clusterCopied(let entry, let stored):
            "L2 entry \(hex(entry)): the COPIED flag is wrong for refcount \(stored)"
        case .unreadableCount(let cluster, let block):
            "cluster \(cluster): its refcount cannot be read (refcount block \(block))"
        default: ""
        }
    }

}

extension CheckFinding.Owner: CustomStringConvertible {
    /// Follows a structure's name in a sentence.
    public var description: String {
        switch self {
        case .active: ""
        case .snapshot(let id, let name): " of snapshot \(id) ('\(name)')"
        }
    }
}
