/// What an image refers to and asks for, found out before anything believes it: which files it
/// would make a program open, how much memory and time its tables and keys take, what a copy grows
/// to.
///
/// No other file than the image is opened; names of other files are only judged.
public struct ImageAudit: Sendable {
    /// The path as it was given.
    public var path: String
    /// The header, as far as it could be believed.
    public var header: Header
    /// Bytes of the file.
    public var fileByteCount: UInt64
    /// Bytes that the file takes on its disk.
    public var allocatedByteCount: UInt64
    /// The internal snapshots, in the table's order.
    public var snapshots: [Snapshot] = []
    /// The persistent bitmaps, in the directory's order.
    public var bitmaps: [BitmapEntry] = []
    /// Every other file that the header names.
    public var references: [Reference] = []
    /// Every feature bit that the header sets.
    public var features: [FeatureBit] = []
    /// Nil for an image that is not encrypted.
    public var encryption: Encryption?
    /// Bytes of each table that a program has to read.
    public var tables = Tables()
    /// What the active L2 tables say of the disk.
    public var contents = Contents()
    /// Why the image is not opened: by the policy, by a limit, or for want of knowledge.
    public var refusals: [String] = []
    /// What is worth knowing before it is opened.
    public var warnings: [String] = []

    /// Whether something keeps the image from being opened.
    public var isRefused: Bool { !refusals.isEmpty }

    /// Examines the image at `path`.
    ///
    /// - Parameters:
    ///   - path: Where the image is.
    ///   - locking: What keeps writers away meanwhile.
    ///   - policy: What references are judged by.
    /// - Throws: `.notQCOW2`, `.malformed`, `.unsupported` where the header cannot be that of an
    ///   image, `.locked`, `.system`.
    public init(
        path: String, policy: OpenPolicy = .imageDirectory,
        locking: OpenOptions.Locking = .required
    ) throws(ImageError) {
        let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        defer { device.close() }
        if locking == .required { try ImageLock.take(.reader, on: device) }
        self.path = path
        header = try Header.read(from: device)
        do throws(SystemError) {
            fileByteCount = try device.byteCount()
            allocatedByteCount = try device.allocatedByteCount()
        } catch {
            throw ImageError(.system(error, operation: "cannot examine"), file: path)
        }
        judgeFeatures()
        try judgeReferences(policy, identity: device.identity)
        try judgeEncryption(device)
        try judgeTables(device)
        try weighContents(device)
    }

    /// Bytes that each kind of table has, as the header and the directories say.
    public struct Tables: Sendable, Equatable {
        /// The active L1 table.
        public var l1: UInt64 = 0
        /// The refcount table.
        public var refcountTable: UInt64 = 0
        /// The snapshot table.
        public var snapshotTable: UInt64 = 0
        /// The L1 tables of all snapshots.
        public var snapshotL1: UInt64 = 0
        /// The bitmap directory.
        public var bitmapDirectory: UInt64 = 0
        /// The tables of all bitmaps.
        public var bitmapTables: UInt64 = 0
        /// The clusters that the bitmap tables point to.
        public var bitmapData: UInt64 = 0
        /// The LUKS header with its key material.
        public var luks: UInt64 = 0

        /// All of them together, in bytes.
        public var total: UInt64 {
            [l1, refcountTable, snapshotTable, snapshotL1, bitmapDirectory, bitmapTables]
                .reduce(bitmapData &+ luks, &+)
        }
    }

    /// Takes note of a fault that keeps the image from being opened; other errors are thrown.
    mutating func refuse(_ error: ImageError) throws(ImageError) {
        guard case .malformed(let reason) = error.kind else { throw error }
        refusals.append(reason.description)
    }

    private mutating func judgeTables(_ device: FileDevice) throws(ImageError) {
        tables.l1 = UInt64(header.l1EntryCount) &* 8
        tables.refcountTable =
            UInt64(header.refcountTableClusterCount) &* header.clusterByteCount
        place("L1 table", at: header.l1Offset, tables.l1)
        place("refcount table", at: header.refcountTableOffset, tables.refcountTable)
        do throws(ImageError) {
            try readSnapshots(device)
        } catch { try refuse(error) }
        do throws(ImageError) {
            try readBitmaps(device)
        } catch { try refuse(error) }
    }

    private mutating func readSnapshots(_ device: FileDevice) throws(ImageError) {
        let (found, byteCount) = try header.readSnapshots(from: device)
        snapshots = found
        tables.snapshotTable = UInt64(byteCount)
        if header.hasDataFile, !found.isEmpty {
            warnings.append(
                CheckFinding.snapshotsWithDataFile(count: header.snapshotCount).description)
        }
        for snapshot in found {
            tables.snapshotL1 &+= UInt64(snapshot.l1EntryCount) &* 8  // 16 + 35 bits
            do throws(FormatError) {
                try snapshot.check(clusterByteCount: header.clusterByteCount)
                place(
                    "L1 table of snapshot \(snapshot.id)", at: snapshot.l1Offset,
                    UInt64(snapshot.l1EntryCount) &* 8)
            } catch { warnings.append(error.description) }
        }
    }

    private mutating func readBitmaps(_ device: FileDevice) throws(ImageError) {
        if header.bitmaps != nil, !header.autoclearFeatures.contains(.bitmaps) {
            warnings.append("has bitmaps that a program has made invalid by writing")
        }
        bitmaps = try header.readBitmaps(from: device)
        guard !bitmaps.isEmpty else { return }
        tables.bitmapDirectory = header.bitmaps?.directoryByteCount ?? 0
        for bitmap in bitmaps {
            // At most 2^16 bitmaps of 2^29 bytes each.
            tables.bitmapTables &+= UInt64(bitmap.tableEntryCount) &* 8
            tables.bitmapData &+= UInt64(bitmap.tableEntryCount) &* header.clusterByteCount
            place(
                "table of bitmap '\(bitmap.name)'", at: bitmap.tableOffset,
                UInt64(bitmap.tableEntryCount) &* 8)
        }
    }

    /// A table may end past the end of the file, where zeros are read, but not begin there.
    private mutating func place(_ name: String, at offset: UInt64, _ byteCount: UInt64) {
        guard byteCount > 0, offset >= fileByteCount else { return }
        warnings.append(
            "the \(name) at \(hex(offset)) lies past the end of the file (\(fileByteCount) bytes)")
    }
}
