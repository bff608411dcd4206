/// Finds every byte of an image that is metadata, as far as tables lead to it that may be damaged.
///
/// A pointer that damage has turned may lead to a guest's bytes.  So a cluster is believed to be a
/// table only if it is counted as one, no L2 entry claims it, and most of what it has can be
/// entries; of all others only what can be an entry passes.
struct MetadataSurvey {
    /// A run of metadata.
    struct Region: Sendable {
        enum Content: Sendable {
            /// The file's own bytes, through a filter unless they are trusted.
            case table(TableFilter.Kind, isTrusted: Bool)
            case bytes([UInt8])
        }

        var offset: UInt64
        var byteCount: UInt64
        var content: Content
    }

    /// Clusters of tables that are kept in mind: as many as 4 TiB of guest data have L2 tables.
    private static let tableLimit = 1 << 22
    /// Bytes of L1 tables that are read, those of many snapshots for instance.
    private static let l1ByteLimit: UInt64 = 8 << 30

    private(set) var regions: [Region] = []
    /// What a person should know of what is missing.
    private(set) var notes: [String] = []

    let header: Header
    let filter: TableFilter
    private let device: any BlockDevice
    private let fileByteCount: UInt64
    private let redactsNames: Bool
    private var refcounts: StoredRefcounts
    /// Tables by their host offset.
    private var tables: [UInt64: TableFilter.Kind] = [:]
    /// Clusters of tables, and whether a guest claims them.
    private var claims: [UInt64: Bool] = [:]
    private var snapshotCount = 0
    private var l1ByteCount: UInt64 = 0
    private var isFull = false
    /// Whether the active L1 table is believed, without which guests' claims are not known.
    private var isTreeTrusted = false

    init(
        _ device: any BlockDevice, _ header: Header, fileByteCount: UInt64, redactsNames: Bool
    ) throws(ImageError) {
        self.device = device
        self.header = header
        self.fileByteCount = fileByteCount
        self.redactsNames = redactsNames
        refcounts = try StoredRefcounts(device, header: header)
        filter = TableFilter(
            end: header.hasDataFile
                ? max(header.virtualByteCount, fileByteCount) : fileByteCount,
            clusterBits: header.clusterBits, isExtended: header.l2EntryByteCount == 16,
            refcounts: RefcountFormat(order: header.refcountOrder))
    }

    private var cluster: UInt64 { header.clusterByteCount }

    /// - Parameter progress: Told what part is done; false cancels.
    mutating func run(_ progress: (Double) -> Bool) throws(ImageError) {
        let snapshots = try findSnapshots()
        let bitmaps = try findBitmaps()
        // Key material is nobody's table.
        if let area = header.encryption { claim(area.offset, area.byteCount, byGuest: true) }
        var l1Tables = [(header.l1Offset, UInt64(header.l1EntryCount))]
        l1Tables += snapshots.filter(canHaveL1Table).map { ($0.l1Offset, UInt64($0.l1EntryCount)) }
        for (offset, count) in l1Tables { try findTables(inL1At: offset, count) }
        try findRefcountBlocks()
        for bitmap in bitmaps { try findData(of: bitmap) }
        try findClaims(progress)

        isTreeTrusted = true
        if header.l1EntryCount > 0 {
            isTreeTrusted = try isTrusted(header.l1Offset, UInt64(header.l1EntryCount) * 8, .l1)
        }
        if !isTreeTrusted { notes.append("the L1 table is damaged: less is believed of the rest") }
        try place(l1Tables, .l1)
        try place(bitmaps.map { ($0.tableOffset, UInt64($0.tableEntryCount)) }, .bitmapTable)
        try place(
            [
                (
                    header.refcountTableOffset,
                    UInt64(header.refcountTableClusterCount) * (cluster / 8)
                )
            ], .refcountTable)
        for (offset, kind) in tables {
            regions.append(
                Region(
                    offset: offset, byteCount: cluster,
                    content: .table(kind, isTrusted: try isTrusted(offset, cluster, kind))))
        }
        try placeSnapshots(snapshots)
        try placeDirectory(bitmaps)
        try placeLUKSHeader()
    }

    // MARK: Reading

    /// Calls `body` with each entry that is not zero; holes of the file are passed over.
    private func forEachEntry(
        at start: UInt64, _ count: UInt64,
        _ body: (_ index: UInt64, _ entry: UInt64) throws(ImageError) -> Void
    ) throws(ImageError) {
        let end = min(start &+ count &* 8, fileByteCount)
        var buffer = [UInt8](repeating: 0, count: 65536)
        var offset = start
        while offset < end {
            do throws(SystemError) {
                guard let data = try device.nextData(from: offset), data < end else { return }
                // An entry begins at a multiple of 8 from the table's start.
                offset = max(offset, start &+ (data &- start) & ~7)
                let part = Int(min(UInt64(buffer.count), end &- offset))
                try buffer.withMutableRawBytes { bytes throws(SystemError) in
                    try device.readPadded(
                        into: UnsafeMutableRawBufferPointer(rebasing: bytes[..<part]), at: offset)
                }
            } catch {
                throw ImageError(
                    .system(error, operation: "cannot read at offset \(offset)"), file: device.name)
            }
            let part = Int(min(UInt64(buffer.count), end &- offset))
            try buffer.withRawBytes { bytes throws(ImageError) in
                for place in stride(from: 0, to: part & ~7, by: 8) {
                    let entry = bytes.bigEndian(at: place, as: UInt64.self) ?? 0
                    if entry != 0 { try body((offset &- start) / 8 &+ UInt64(place / 8), entry) }
                }
            }
            offset &+= UInt64(max(part & ~7, 8))
        }
    }

    // MARK: Tables

    private mutating func findTables(
        inL1At offset: UInt64, _ count: UInt64
    ) throws(ImageError) {
        claim(offset, count &* 8, byGuest: false)
        l1ByteCount &+= count &* 8
        guard l1ByteCount <= Self.l1ByteLimit else {
            isFull = true
            return
        }
        var found: [UInt64] = []
        try forEachEntry(at: offset, count) { _, entry in found.append(L1Entry(bits: entry).offset)
        }
        for table in found { add(table, .l2) }
    }

    private mutating func findRefcountBlocks() throws(ImageError) {
        let count = UInt64(header.refcountTableClusterCount) &* (cluster / 8)
        claim(header.refcountTableOffset, count &* 8, byGuest: false)
        var found: [UInt64] = []
        try forEachEntry(at: header.refcountTableOffset, count) { _, entry in
            let offset = RefcountTableEntry(bits: entry).offset
            if offset & (cluster &- 1) == 0 { found.append(offset) }
        }
        for block in found { add(block, .refcountBlock) }
    }

    private mutating func findData(of bitmap: BitmapEntry) throws(ImageError) {
        let count = UInt64(bitmap.tableEntryCount)
        claim(bitmap.tableOffset, count &* 8, byGuest: false)
        var found: [UInt64] = []
        try forEachEntry(at: bitmap.tableOffset, count) { _, entry in
            let offset = BitmapTableEntry(bits: entry).offset
            if offset & (cluster &- 1) == 0 { found.append(offset) }
        }
        for data in found { add(data, .bitmapData) }
    }

    private mutating func add(_ offset: UInt64, _ kind: TableFilter.Kind) {
        guard offset >= cluster, offset < fileByteCount else { return }
        guard tables.count < Self.tableLimit else {
            isFull = true
            return
        }
        if tables[offset] == nil { tables[offset] = kind }
        claim(offset, cluster, byGuest: false)
    }

    private mutating func claim(_ offset: UInt64, _ byteCount: UInt64, byGuest: Bool) {
        let end = min(offset &+ byteCount, fileByteCount)
        guard byteCount > 0, offset < end else { return }
        for number in offset >> UInt64(header.clusterBits)...(end - 1) >> UInt64(header.clusterBits)
        {
            claims[number, default: false] = claims[number] == true || byGuest
        }
    }

    /// Looks which clusters of tables are claimed by L2 entries too.
    private mutating func findClaims(_ progress: (Double) -> Bool) throws(ImageError) {
        if isFull { notes.append("there are too many tables: some are left out") }
        // Entries of an image with a data file lead there.
        guard !header.hasDataFile else { return }
        let words = header.l2EntryByteCount / 8
        let all = tables.filter { $0.value == .l2 }.keys.sorted()
        for (number, table) in all.enumerated() {
            var claimed: [UInt64] = []
            try forEachEntry(at: table, cluster / 8) { index, bits in
                guard index % words == 0 else { return }
                var runs: [ClusterRun] = []
                runs.append(
                    references: L2Entry(bits: bits), clusterBits: UInt64(header.clusterBits))
                for run in runs {
                    for number in run.first..<run.end where claims[number] == false {
                        claimed.append(number)
                    }
                }
            }
            for number in claimed { claims[number] = true }
            if number % 64 == 0, !progress(Double(number) / Double(all.count)) {
                throw ImageError(.cancelled, file: device.name)
            }
        }
    }

    private mutating func place(
        _ found: [(offset: UInt64, count: UInt64)], _ kind: TableFilter.Kind
    ) throws(ImageError) {
        for (offset, count) in found where count > 0 {
            regions.append(
                Region(
                    offset: offset, byteCount: count &* 8,
                    content: .table(kind, isTrusted: try isTrusted(offset, count &* 8, kind))))
        }
    }

    /// Whether clusters are counted as what they should be, nobody else claims them, and they have
    /// what such a table has.
    private mutating func isTrusted(
        _ offset: UInt64, _ byteCount: UInt64, _ kind: TableFilter.Kind? = nil
    ) throws(ImageError) -> Bool {
        guard offset & (cluster &- 1) == 0, byteCount > 0, offset < fileByteCount else {
            return false
        }
        let most = kind == .l2 ? 1 + UInt64(snapshotCount) : 1
        let bits = UInt64(header.clusterBits)
        let end = min(offset &+ byteCount, fileByteCount)
        for number in offset >> bits...(end - 1) >> bits {
            guard claims[number] != true, let count = try refcounts.count(of: number),
                (1...most).contains(count)
            else { return false }
        }
        guard let kind, filter.tells(kind) else { return isTreeTrusted }
        return try hasEntries(offset..<end, kind)
    }

    private func hasEntries(
        _ range: Range<UInt64>, _ kind: TableFilter.Kind
    ) throws(ImageError) -> Bool {
        var passage = TableFilter.Passage()
        var buffer = [UInt8](repeating: 0, count: 65536)
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = Int(min(UInt64(buffer.count), range.upperBound - offset))
            do throws(SystemError) {
                try buffer.withMutableRawBytes { bytes throws(SystemError) in
                    let part = UnsafeMutableRawBufferPointer(rebasing: bytes[..<count])
                    try device.readPadded(into: part, at: offset)
                    passage.add(filter.apply(kind, to: part))
                }
            } catch {
                throw ImageError(
                    .system(error, operation: "cannot read at offset \(offset)"),
                    file: device.name)
            }
            offset += UInt64(count)
        }
        return passage.isTable
    }

    // MARK: What has names

    private mutating func findSnapshots() throws(ImageError) -> [Snapshot] {
        guard header.snapshotCount > 0 else { return [] }
        let bytes = try Header.read(
            Int(Limits.snapshotTableByteCount), at: header.snapshotsOffset, of: device)
        let found = bytes.withRawBytes {
            Snapshot.parsePrefix($0, count: Int(header.snapshotCount))
        }
        if found.count < header.snapshotCount {
            notes.append("the snapshot table breaks off after \(found.count) entries")
        }
        snapshotCount = found.count
        claim(header.snapshotsOffset, UInt64(found.tableByteCount), byGuest: false)
        return found
    }

    private func canHaveL1Table(_ snapshot: Snapshot) -> Bool {
        do throws(FormatError) {
            try snapshot.check(clusterByteCount: cluster)
            return true
        } catch { return false }
    }

    private mutating func placeSnapshots(_ snapshots: [Snapshot]) throws(ImageError) {
        guard !snapshots.isEmpty else { return }
        let isTrusted = try isTrusted(header.snapshotsOffset, UInt64(snapshots.tableByteCount))
        var names = NameMask()
        let kept = snapshots.map { snapshot in
            var snapshot = snapshot
            if redactsNames || !isTrusted { names.mask(&snapshot.nameBytes) }
            if !isTrusted {
                names.mask(&snapshot.idBytes)
                for index in snapshot.extraData.indices.dropFirst(24) {
                    snapshot.extraData[index] = 0
                }
            }
            return snapshot
        }
        let bytes = Snapshot.encodeTable(kept)
        regions.append(
            Region(
                offset: header.snapshotsOffset, byteCount: UInt64(bytes.count),
                content: .bytes(bytes)))
    }

    private mutating func findBitmaps() throws(ImageError) -> [BitmapEntry] {
        do throws(ImageError) {
            let bitmaps = try header.readBitmaps(from: device)
            if let directory = header.bitmaps, !bitmaps.isEmpty {
                claim(directory.directoryOffset, directory.directoryByteCount, byGuest: false)
            }
            return bitmaps
        } catch {
            guard case .malformed(let reason) = error.kind else { throw error }
            notes.append("the bitmap directory is left out: \(reason)")
            return []
        }
    }

    private mutating func placeDirectory(_ bitmaps: [BitmapEntry]) throws(ImageError) {
        guard let directory = header.bitmaps, !bitmaps.isEmpty else { return }
        let isTrusted = try isTrusted(directory.directoryOffset, directory.directoryByteCount)
        var names = NameMask()
        let kept = bitmaps.map { bitmap in
            var bitmap = bitmap
            if redactsNames || !isTrusted { names.mask(&bitmap.nameBytes) }
            if !isTrusted {
                bitmap.extraData = Array(repeating: 0, count: bitmap.extraData.count)
            }
            return bitmap
        }
        let bytes = BitmapEntry.encodeDirectory(kept)
        regions.append(
            Region(
                offset: directory.directoryOffset, byteCount: UInt64(bytes.count),
                content: .bytes(bytes)))
    }

    /// The LUKS header says how the disk is encrypted; nothing that helps to find the key stays.
    private mutating func placeLUKSHeader() throws(ImageError) {
        guard let area = header.encryption else { return }
        do throws(ImageError) {
            var luks = try LUKSVolume.header(of: header, in: device)
            luks.keyDigest = Array(repeating: 0, count: luks.keyDigest.count)
            luks.keyDigestSalt = Array(repeating: 0, count: luks.keyDigestSalt.count)
            for index in luks.keySlots.indices {
                let count = luks.keySlots[index].salt.count
                luks.keySlots[index].salt = Array(repeating: 0, count: count)
            }
            let bytes = luks.encoded()
            regions.append(
                Region(offset: area.offset, byteCount: UInt64(bytes.count), content: .bytes(bytes)))
        } catch {
            guard case .malformed(let reason) = error.kind else { throw error }
            notes.append("the LUKS header is left out: \(reason)")
        }
    }
}

/// Names that say nothing, of the same lengths, and different ones for different names.
struct NameMask {
    private static let letters = Array("abcdefghijklmnopqrstuvwxyz".utf8)
    private var count = 0

    mutating func mask(_ name: inout [UInt8]) {
        var rest = count
        count += 1
        for index in name.indices.reversed() {
            name[index] = Self.letters[rest % Self.letters.count]
            rest /= Self.letters.count
        }
    }
}
