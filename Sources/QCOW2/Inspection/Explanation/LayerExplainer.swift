/// Looks a byte up in the tables of one qcow2 file.
struct LayerExplainer {
    private let device: any BlockDevice
    private let header: Header
    private let path: String
    private let snapshots: [Snapshot]
    private var refcounts: StoredRefcounts
    /// Where the L1 table is that is looked up, and how large its disk is.
    private var l1Offset: UInt64
    private var l1EntryCount: UInt64
    private(set) var virtualByteCount: UInt64
    /// The snapshot that is looked at instead of the active disk.
    private var viewed: Snapshot?

    init(_ device: any BlockDevice, _ header: Header, path: String) throws(ImageError) {
        self.device = device
        self.header = header
        self.path = path
        refcounts = try StoredRefcounts(device, header: header)
        l1Offset = header.l1Offset
        l1EntryCount = UInt64(header.l1EntryCount)
        virtualByteCount = header.virtualByteCount
        snapshots = try Self.readableSnapshots(of: header, on: device)
    }

    /// A table of snapshots that makes no sense says nothing of who shares a cluster.
    private static func readableSnapshots(
        of header: Header, on device: any BlockDevice
    ) throws(ImageError) -> [Snapshot] {
        do throws(ImageError) {
            return try header.readSoundSnapshots(from: device)
        } catch {
            guard case .malformed = error.kind else { throw error }
            return []
        }
    }

    /// Looks at a snapshot instead of the active disk.
    mutating func view(_ word: String) throws(ImageError) {
        guard let snapshot = snapshots.find(word) else {
            throw ImageError(.invalidArgument("there is no snapshot '\(word)'"), file: path)
        }
        viewed = snapshot
        l1Offset = snapshot.l1Offset
        l1EntryCount = UInt64(snapshot.l1EntryCount)
        virtualByteCount = (snapshot.diskByteCount ?? header.size) & ~511
    }

    private var clusterMask: UInt64 { header.clusterByteCount &- 1 }
    /// Bytes of the disk that one L2 table describes, as a power of two: at most 39.
    private var coverageBits: UInt64 {
        UInt64(header.clusterBits) &* 2 &- (header.l2EntryByteCount == 16 ? 4 : 3)
    }

    // MARK: The way down

    mutating func explain(_ offset: UInt64) throws(ImageError) -> Explanation.Layer {
        var layer = Explanation.Layer(
            path: path, format: .qcow2, virtualByteCount: virtualByteCount,
            clusterByteCount: header.clusterByteCount, answer: .unallocated)
        guard offset < virtualByteCount else {
            layer.answer = .pastTheEnd
            return layer
        }
        guard let l1 = try l1Entry(of: offset, at: l1Offset, l1EntryCount) else { return layer }
        layer.l1 = try counted(l1)
        guard l1.target != 0 else { return layer }
        guard l1.target & clusterMask == 0 else {
            layer.answer = .corrupt(
                "the L2 table at \(hex(l1.target)) is not aligned to the cluster size "
                    + "(\(header.clusterByteCount))")
            return layer
        }
        let (l2, entry) = try l2Entry(of: offset, in: l1.target)
        layer.l2 = l2
        try judge(entry, at: offset, &layer)
        layer.sharers = try sharers(of: offset, l1, entry)
        return layer
    }

    private func l1Entry(
        of offset: UInt64, at table: UInt64, _ entryCount: UInt64
    ) throws(ImageError) -> Explanation.TableEntry? {
        let index = offset &>> coverageBits
        guard index < entryCount else { return nil }
        let place = table &+ index &* 8  // offsets of tables have 56 bits, the index 22
        let entry = L1Entry(bits: try word(at: place))
        return Explanation.TableEntry(
            index: index, place: place, bits: entry.bits, target: entry.offset,
            isCopied: entry.isCopied, reservedBits: entry.reservedBits)
    }

    private mutating func counted(
        _ entry: Explanation.TableEntry
    ) throws(ImageError) -> Explanation.TableEntry {
        guard entry.target != 0 else { return entry }
        var entry = entry
        entry.refcount = try refcounts.count(of: entry.target &>> UInt64(header.clusterBits))
        return entry
    }

    private func l2Entry(
        of offset: UInt64, in table: UInt64
    ) throws(ImageError) -> (Explanation.TableEntry, L2Entry) {
        let perTable = header.clusterByteCount / header.l2EntryByteCount
        let index = offset &>> UInt64(header.clusterBits) & (perTable &- 1)
        let place = table &+ index &* header.l2EntryByteCount
        var entry = L2Entry(bits: try word(at: place))
        if isExtended { entry.subclusters = SubclusterBitmap(bits: try word(at: place &+ 8)) }
        let target =
            entry.isCompressed
            ? CompressedDescriptor(entry, clusterBits: header.clusterBits).offset : entry.offset
        let described = Explanation.TableEntry(
            index: index, place: place, bits: entry.bits, target: target,
            isCopied: entry.isCopied, isCompressed: entry.isCompressed,
            hasZeroFlag: !entry.isCompressed && !isExtended && entry.hasZeroFlag,
            reservedBits: entry.reservedBits)
        return (described, entry)
    }

    private var isExtended: Bool { header.l2EntryByteCount == 16 }

    // MARK: What an entry means

    private mutating func judge(
        _ entry: L2Entry, at offset: UInt64, _ layer: inout Explanation.Layer
    ) throws(ImageError) {
        let inCluster = offset & clusterMask
        let subcluster = Int(inCluster / max(header.clusterByteCount / 32, 1))
        if isExtended, !entry.isCompressed {
            layer.subcluster = Explanation.Subcluster(
                index: subcluster, allocated: entry.subclusters.allocated,
                zero: entry.subclusters.zero)
        }
        let kind = kind(of: entry, at: offset, subcluster)
        layer.answer = answer(kind, entry, at: offset)
        if !header.hasDataFile { layer.clusters = try hostClusters(of: entry) }
        switch kind {
        case .compressed: layer.stream = stream(entry, at: inCluster)
        case .data:
            let host = entry.offset &+ inCluster
            layer.place = Explanation.Place(
                path: header.hasDataFile ? header.dataFileName ?? "" : path, offset: host)
            layer.encryption = encryption(host: host, guest: offset)
        default: break
        }
    }

    private func kind(
        of entry: L2Entry, at offset: UInt64, _ subcluster: Int
    ) -> ClusterKind {
        if isExtended {
            if header.hasDataFile, entry.isCompressed || !isInPlace(entry, offset) {
                return .corrupt
            }
            return entry.kind(
                ofSubcluster: subcluster,
                hasCluster: entry.hasCluster(inDataFile: header.hasDataFile),
                clusterMask: clusterMask)
        }
        return header.hasDataFile
            ? entry.kindWithDataFile(at: offset & ~clusterMask)
            : entry.kind(clusterMask: clusterMask, version: header.version)
    }

    /// Whether an entry without or with a cluster in a data file has the place that it must have.
    private func isInPlace(_ entry: L2Entry, _ offset: UInt64) -> Bool {
        entry.offset == offset & ~clusterMask || entry.offset == 0 && !entry.isCopied
    }

    private func answer(
        _ kind: ClusterKind, _ entry: L2Entry, at offset: UInt64
    ) -> Explanation.Answer {
        switch kind {
        case .unallocated: .unallocated
        case .zeroPlain: .zeroPlain
        case .zeroAllocated: .zeroAllocated
        case .data: .data
        case .compressed: .compressed
        case .corrupt where header.hasDataFile && (entry.isCompressed || !isInPlace(entry, offset)):
            .corrupt(entry.faultWithDataFile)
        case .corrupt:
            .corrupt(
                entry.fault(
                    clusterByteCount: header.clusterByteCount, version: header.version,
                    isExtended: isExtended))
        }
    }

    private func stream(_ entry: L2Entry, at position: UInt64) -> Explanation.Stream {
        let descriptor = CompressedDescriptor(entry, clusterBits: header.clusterBits)
        return Explanation.Stream(
            offset: descriptor.offset, byteCount: descriptor.byteCount, position: position,
            type: header.compressionType)
    }

    private func encryption(host: UInt64, guest: UInt64) -> Explanation.Encryption? {
        switch header.encryptionMethod {
        case 1: Explanation.Encryption(method: .aes, sector: guest / 512)
        case 2: Explanation.Encryption(method: .luks, sector: host / 512)
        default: nil
        }
    }

    // MARK: References

    private mutating func hostClusters(
        of entry: L2Entry
    ) throws(ImageError) -> [Explanation.HostCluster] {
        var runs: [ClusterRun] = []
        runs.append(references: entry, clusterBits: UInt64(header.clusterBits))
        var clusters: [Explanation.HostCluster] = []
        // A stream touches three clusters at most.
        for cluster in runs.flatMap({ $0.first..<$0.end }) {
            clusters.append(
                Explanation.HostCluster(
                    offset: cluster &<< UInt64(header.clusterBits),
                    refcount: try refcounts.count(of: cluster)))
        }
        return clusters
    }

    /// The disks beside the one that is looked at which have the same table or cluster here.
    private func sharers(
        of offset: UInt64, _ l1: Explanation.TableEntry, _ entry: L2Entry
    ) throws(ImageError) -> [Explanation.Sharer] {
        var found: [Explanation.Sharer] = []
        for snapshot in snapshots where snapshot != viewed {
            let other = try l1Entry(
                of: offset, at: snapshot.l1Offset, UInt64(snapshot.l1EntryCount))
            guard let other, other.target != 0, other.target & clusterMask == 0 else { continue }
            let sharesTable = other.target == l1.target
            let sharesCluster =
                sharesTable ? true : try isSame(entry, inTable: other.target, offset)
            guard sharesTable || sharesCluster else { continue }
            found.append(
                Explanation.Sharer(
                    id: snapshot.id, name: snapshot.name, sharesTable: sharesTable,
                    sharesCluster: sharesCluster && (entry.isCompressed || entry.offset != 0)))
        }
        return found
    }

    private func isSame(
        _ entry: L2Entry, inTable table: UInt64, _ offset: UInt64
    ) throws(ImageError) -> Bool {
        let (_, other) = try l2Entry(of: offset, in: table)
        if entry.isCompressed || other.isCompressed { return other.bits == entry.bits }
        return entry.offset != 0 && other.offset == entry.offset
    }

    /// A big-endian word of the file; past the end are zeros.
    private func word(at offset: UInt64) throws(ImageError) -> UInt64 {
        var bytes: UInt64 = 0
        do throws(SystemError) {
            try withUnsafeMutableBytes(of: &bytes) { buffer throws(SystemError) in
                try device.readPadded(into: buffer, at: offset)
            }
        } catch {
            throw ImageError(
                .system(error, operation: "cannot read at offset \(offset)"), file: path)
        }
        return UInt64(bigEndian: bytes)
    }
}
