/// New bytes for L1 and L2 tables in which flags are wrong.  What the guest reads stays.
struct TableCorrections {
    /// Edits of L2 tables, and of the L1 tables of snapshots.
    private(set) var edits: [RepairPlan.Edit] = []
    /// Edits of the active L1 table.
    private(set) var l1Edits: [RepairPlan.Edit] = []
    private(set) var changedEntryCount = 0
    /// Whether every table could be looked at, none being something else besides.
    private(set) var isComplete = true

    private let device: any BlockDevice
    private let header: Header
    private let clusterBits: UInt64
    private let snapshots: [Snapshot]
    /// Whether the edits of the active L1 table are for a copy of it.
    private let movesL1: Bool
    private var seen: Set<UInt64> = []
    /// References to every cluster, and those to every L2 table from L1 tables.  Where there are
    /// more of the former, guest data or something else shares the table's cluster, and a change
    /// of the table would be seen there.
    private let counts: ReferenceCounts
    private var tableReferences: [UInt64: UInt64] = [:]

    init(
        _ device: any BlockDevice, _ header: Header, _ counts: ReferenceCounts,
        movesL1: Bool = false
    ) throws(ImageError) {
        self.device = device
        self.movesL1 = movesL1
        self.header = header
        self.counts = counts
        clusterBits = UInt64(header.clusterBits)
        snapshots = try header.readSoundSnapshots(from: device)
        try countTables(header.l1Offset, UInt64(header.l1EntryCount))
        for snapshot in snapshots {
            try countTables(snapshot.l1Offset, UInt64(snapshot.l1EntryCount))
        }
    }

    private mutating func countTables(
        _ l1Offset: UInt64, _ entryCount: UInt64
    ) throws(ImageError) {
        let bytes = try Header.read(Int(entryCount) * 8, at: l1Offset, of: device)
        for position in stride(from: 0, to: bytes.count, by: 8) {
            let bits = bytes.withRawBytes { $0.bigEndian(at: position, as: UInt64.self) } ?? 0
            if bits != 0 { tableReferences[L1Entry(bits: bits).offset, default: 0] += 1 }
        }
    }

    private func isShared(_ table: UInt64) -> Bool {
        let cluster = table >> clusterBits
        return counts.count(of: cluster) > tableReferences[table] ?? 0
            || counts.hasMoreThanCounted(cluster)
    }

    private func isShared(l1 range: Range<UInt64>) -> Bool {
        range.lowerBound < range.upperBound
            && (range.lowerBound >> clusterBits...(range.upperBound &- 1) >> clusterBits)
                .contains(where: counts.isShared)
    }

    /// Sets COPIED in the active tables where `count` of the target, a cluster, is 1, and only
    /// there; nil leaves it as it is.
    mutating func correctActive(
        count: (UInt64) throws(ImageError) -> UInt64?, clearsMeaningless: Bool
    ) throws(ImageError) {
        let (header, clusterBits) = (header, clusterBits)
        try correct(
            l1Offset: header.l1Offset, entryCount: UInt64(header.l1EntryCount)
        ) { entry throws(ImageError) in
            var bits = entry.bits
            if clearsMeaningless { bits &= L1Entry.offsetMask | L1Entry.copied }
            guard let count = try count(entry.offset >> clusterBits) else { return bits }
            return count == 1 ? bits | L1Entry.copied : bits & ~L1Entry.copied
        } l2: { entry throws(ImageError) in
            let entry = clearsMeaningless ? Self.meaningful(entry, header) : entry
            guard !entry.isCompressed, entry.offset != 0 else { return entry }
            // Nothing in a data file has a second reference.
            if header.hasDataFile { return clearsMeaningless ? entry.withCopied(true) : entry }
            guard let count = try count(entry.offset >> clusterBits) else { return entry }
            return entry.withCopied(count == 1)
        }
    }

    /// Clears bits without a meaning in the tables of the snapshots.
    mutating func clearMeaninglessBitsOfSnapshots() throws(ImageError) {
        let header = header
        for snapshot in snapshots {
            try correct(
                l1Offset: snapshot.l1Offset, entryCount: UInt64(snapshot.l1EntryCount)
            ) { entry in
                entry.bits & (L1Entry.offsetMask | L1Entry.copied)
            } l2: {
                Self.meaningful($0, header)
            }
        }
    }

    /// An entry that reads the same, without bits that have no meaning there.
    private static func meaningful(_ entry: L2Entry, _ header: Header) -> L2Entry {
        // A compressed cluster has no subclusters; who reads it overlooks a bitmap.
        if entry.isCompressed { return L2Entry(bits: entry.withoutCopied.bits) }
        let entry = L2Entry(
            bits: entry.bits & ~entry.reservedBits, subclusters: entry.subclusters)
        let isMisaligned = entry.offset & (header.clusterByteCount &- 1) != 0
        let isZero = entry.hasZeroFlag && header.version >= 3 && header.l2EntryByteCount == 8
        return isMisaligned && isZero ? .zeroPlain : entry
    }

    private mutating func correct(
        l1Offset: UInt64, entryCount: UInt64,
        l1: (L1Entry) throws(ImageError) -> UInt64, l2: (L2Entry) throws(ImageError) -> L2Entry
    ) throws(ImageError) {
        var tables: [UInt64] = []
        let clusterMask = header.clusterByteCount &- 1
        let edit = try correctedTable(
            at: l1Offset, byteCount: Int(entryCount) * 8, entryByteCount: 8
        ) { bits, _ throws(ImageError) in
            let entry = L1Entry(bits: bits)
            guard entry.offset != 0, entry.offset & clusterMask == 0 else {
                return (bits, 0)
            }
            tables.append(entry.offset)
            return (try l1(entry), 0)
        }
        let isActive = l1Offset == header.l1Offset
        if !(isActive && movesL1), isShared(l1: l1Offset..<l1Offset &+ entryCount &* 8) {
            isComplete = false
        } else if let edit {
            if isActive { l1Edits.append(edit) } else { edits.append(edit) }
        }
        for table in tables where seen.insert(table).inserted {
            guard !isShared(table) else {
                isComplete = false
                continue
            }
            let edit = try correctedTable(
                at: table, byteCount: Int(header.clusterByteCount),
                entryByteCount: Int(header.l2EntryByteCount)
            ) { bits, bitmap throws(ImageError) in
                let entry = try l2(
                    L2Entry(bits: bits, subclusters: SubclusterBitmap(bits: bitmap)))
                return (entry.bits, entry.subclusters.bits)
            }
            if let edit { edits.append(edit) }
        }
    }

    /// The changed part of one table; nil where nothing changes.
    /// - Parameter change: Gets an entry's words: the second is 0 where there is none.
    private mutating func correctedTable(
        at offset: UInt64, byteCount: Int, entryByteCount: Int,
        _ change: (UInt64, UInt64) throws(ImageError) -> (UInt64, UInt64)
    ) throws(ImageError) -> RepairPlan.Edit? {
        guard byteCount > 0 else { return nil }
        var bytes = try Header.read(byteCount, at: offset, of: device)
        var changed: Range<Int>?
        for position in stride(from: 0, to: byteCount, by: entryByteCount) {
            let (bits, bitmap) = bytes.withRawBytes { bytes in
                (
                    bytes.bigEndian(at: position, as: UInt64.self) ?? 0,
                    entryByteCount > 8
                        ? bytes.bigEndian(at: position + 8, as: UInt64.self) ?? 0 : 0
                )
            }
            let new = bits == 0 ? (bits, bitmap) : try change(bits, bitmap)
            guard new != (bits, bitmap) else { continue }
            bytes.storeBigEndian(new.0, at: position)
            if entryByteCount > 8 { bytes.storeBigEndian(new.1, at: position + 8) }
            changed = (changed?.lowerBound ?? position)..<position + entryByteCount
            changedEntryCount += 1
        }
        guard let changed else { return nil }
        return RepairPlan.Edit(
            offset: offset &+ UInt64(changed.lowerBound), bytes: Array(bytes[changed]))
    }
}
