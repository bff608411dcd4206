/// The L2 tables below an L1 table, as the file has them, and what they refer to.
///
/// For tables that nobody changes meanwhile: those of a snapshot, or the active ones right after a
/// commit and under every range lock.
package struct TableTree: Sendable {
    package enum Damage: Sendable {
        /// A bad entry ends the walk.
        case refused
        /// A bad entry is passed over: what it means belongs to nobody.
        case ignored
    }

    /// References handed out at once, about.
    private static let batchCount: UInt64 = 8192

    private let file: HostFile
    private let entries: [L1Entry]
    private let clusterBits: UInt64
    private let entryByteCount: Int
    private let version: UInt32
    /// Clusters of an external data file are not counted.
    private let countsData: Bool

    package init(_ entries: [L1Entry], in file: HostFile, header: Header) {
        self.file = file
        self.entries = entries
        clusterBits = UInt64(header.clusterBits)
        entryByteCount = Int(header.l2EntryByteCount)
        version = header.version
        countsData = !header.incompatibleFeatures.contains(.externalDataFile)
    }

    /// Reads the L1 table of `snapshot`, or its first `limit` entries; COPIED has no meaning there
    /// and is masked.
    /// - Throws: `.malformed` where the table cannot be what it says, `.system`.
    package static func l1Entries(
        of snapshot: Snapshot, in file: HostFile, header: Header, limit: UInt64 = .max
    ) throws(ImageError) -> [L1Entry] {
        do throws(FormatError) {
            try snapshot.check(clusterByteCount: header.clusterByteCount)
        } catch {
            throw ImageError(.malformed(error), file: file.name)
        }
        let count = Int(min(UInt64(snapshot.l1EntryCount), limit))
        guard count > 0 else { return [] }
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: count * 8, alignment: 8)
        defer { buffer.deallocate() }
        try file.read(into: buffer, at: snapshot.l1Offset)
        return buffer.bindMemory(to: UInt64.self).map {
            L1Entry(bits: UInt64(bigEndian: $0)).withoutCopied
        }
    }

    /// Calls `body` with every reference that the tables hold, and those to the tables themselves,
    /// some at a time: each time the same ones, as long as the tables are the same.
    package func forEachReference(
        _ damage: Damage, _ body: ([ClusterRun]) throws(ImageError) -> Void
    ) throws(ImageError) {
        var batch = Batch()
        try forEachTable(damage) { table throws(ImageError) in
            batch.add(ClusterRun(first: table &>> clusterBits, count: 1))
            guard countsData else { return }
            try forEachEntry(ofTableAt: table) { entry throws(ImageError) in
                if try isFine(entry, damage) {
                    batch.add(entry, clusterBits: clusterBits)
                    if batch.count >= Self.batchCount { try body(batch.take()) }
                }
            }
        }
        if batch.count > 0 { try body(batch.take()) }
    }

    /// Clears COPIED in every entry of the tables.
    package func clearCopied() throws(ImageError) {
        try forEachTable(.ignored) { table throws(ImageError) in
            try forEachPiece(ofTableAt: table) { offset, bytes throws(ImageError) in
                var isChanged = false
                for position in stride(from: 0, to: bytes.count, by: entryByteCount) {
                    let entry = Self.entry(UnsafeRawBufferPointer(bytes), at: position)
                    guard entry.isCopied, !entry.isCompressed else { continue }
                    bytes.storeBigEndian(entry.withoutCopied.bits, at: position)
                    isChanged = true
                }
                if isChanged { try file.write(UnsafeRawBufferPointer(bytes), at: offset) }
            }
        }
    }

    private func forEachTable(
        _ damage: Damage, _ body: (UInt64) throws(ImageError) -> Void
    ) throws(ImageError) {
        for entry in entries where entry.offset != 0 {
            let isAligned = entry.offset & (1 &<< clusterBits &- 1) == 0
            guard isAligned || damage == .ignored else {
                throw file.corrupt(
                    "L1 entry \(hex(entry.bits)) points inside a cluster: check the image")
            }
            if isAligned { try body(entry.offset) }
        }
    }

    private func forEachEntry(
        ofTableAt table: UInt64, _ body: (L2Entry) throws(ImageError) -> Void
    ) throws(ImageError) {
        try forEachPiece(ofTableAt: table) { _, bytes throws(ImageError) in
            let bytes = UnsafeRawBufferPointer(bytes)
            for position in stride(from: 0, to: bytes.count, by: entryByteCount) {
                let entry = Self.entry(bytes, at: position)
                if entry.bits != 0 { try body(entry) }
            }
        }
    }

    @inline(__always)
    private static func entry(_ bytes: UnsafeRawBufferPointer, at position: Int) -> L2Entry {
        L2Entry(bits: bytes.bigEndian(at: position) ?? 0)
    }

    private func forEachPiece(
        ofTableAt table: UInt64,
        _ body: (UInt64, UnsafeMutableRawBufferPointer) throws(ImageError) -> Void
    ) throws(ImageError) {
        let end = table &+ 1 &<< clusterBits
        let byteCount = Int(min(1 &<< clusterBits, 256 << 10))
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 4096)
        defer { buffer.deallocate() }
        var offset = table
        while offset < end {
            try file.read(into: buffer, at: offset)
            try body(offset, buffer)
            offset &+= UInt64(byteCount)
        }
    }

    private func isFine(_ entry: L2Entry, _ damage: Damage) throws(ImageError) -> Bool {
        if entry.hasCountableReferences(clusterBits: clusterBits) { return true }
        guard damage == .refused else { return false }
        throw file.corrupt(
            entry.fault(
                clusterByteCount: 1 &<< clusterBits, version: version,
                isExtended: entryByteCount == 16) + ": check the image")
    }
}

/// References on their way.
private struct Batch {
    private var runs: [ClusterRun] = []
    private(set) var count: UInt64 = 0

    mutating func add(_ run: ClusterRun) {
        runs.append(joining: run)
        count &+= run.count
    }

    mutating func add(_ entry: L2Entry, clusterBits: UInt64) {
        let before = runs.last?.count ?? 0
        let places = runs.count
        runs.append(references: entry, clusterBits: clusterBits)
        let added = runs.last?.count ?? 0
        count &+= runs.count == places ? added &- before : added
    }

    mutating func take() -> [ClusterRun] {
        defer { self = Batch() }
        return runs
    }
}

extension L2Entry {
    /// Whether the references that the entry holds can be told: an entry that points inside a
    /// cluster, or past every file, has none that mean anything.
    func hasCountableReferences(clusterBits: UInt64) -> Bool {
        guard isCompressed else { return offset & (1 &<< clusterBits &- 1) == 0 }
        let bits = UInt32(truncatingIfNeeded: clusterBits)
        return !isCopied
            && CompressedDescriptor(self, clusterBits: bits).offset < Limits.hostOffset
    }
}
