internal import Glibc
internal import Synchronization

/// Which guest cluster is where, in one layer: the active L1 table in memory, slices of L2 tables
/// in a cache.
///
/// Looking up takes no lock.  Changing an entry, loading a slice and freezing dirty tables for a
/// commit happen under `state`'s lock, which is never held across I/O.  Who changes entries holds
/// the exclusive range lock of their guest range, so a looker-up's own entries stand still.
package final class ClusterMap: Sendable {
    package let file: HostFile
    package let version: UInt32
    package let clusterBits: UInt64
    /// Entries of an L2 table, as a power of two.
    package let tableBits: UInt64
    let clusterMask: UInt64
    /// Whether guest data lies in an external data file, at host offsets that are guest offsets.
    package let hasDataFile: Bool
    /// Whether entries have a second word, for subclusters.
    let isExtended: Bool
    /// Bytes of an entry, as a power of two.
    let entryBits: UInt64
    /// Bytes of what is allocated at once: a subcluster, or a cluster where there are none.
    let subclusterBits: UInt64
    /// Entries of a slice, as a power of two.
    let sliceBits: UInt64
    let cache: SliceCache
    /// The live L1 table; replaced only while every range lock is held.
    nonisolated(unsafe) let table: UnsafeMutablePointer<L1Table>
    let state: Monitor<State>

    /// The active L1 table: its entries and where it lies.
    struct L1Table: ~Copyable {
        let entries: AtomicArray
        let offset: UInt64

        init(entryCount: Int, offset: UInt64, in file: HostFile) throws(ImageError) {
            entries = try AtomicArray(
                count: entryCount, for: "an L1 table of \(entryCount) entries", of: file.name)
            self.offset = offset
        }
    }

    struct State {
        /// What keeps a slot from being emptied.
        var marks: [SlotMarks]
        /// Slices being read from the file.
        var loading: [UInt64] = []
        /// Slots changed since the last freeze.
        var dirtySlots: [Int] = []
        /// Slots whose frozen copies are not durable yet.
        var frozenSlots: [Int] = []
        /// 4 KiB pages of the L1 table changed since the last freeze.
        var dirtyL1Pages: Set<Int> = []
        /// The L1 table lies somewhere new since the last freeze.
        var hasMoved = false
        /// References dropped by changes since the last freeze.
        var dropped: [ClusterRun] = []
        /// Whether an entry now shows data that may not be durable yet.
        var exposesData = false
    }

    struct SlotMarks: OptionSet {
        let rawValue: UInt8
        static let loading = Self(rawValue: 1)
        static let dirty = Self(rawValue: 2)
        static let frozen = Self(rawValue: 4)
    }

    /// Reads the active L1 table of `header`.
    package init(_ header: Header, in file: HostFile, cacheByteCount: Int) throws(ImageError) {
        self.file = file
        version = header.version
        clusterBits = UInt64(header.clusterBits)
        isExtended = header.incompatibleFeatures.contains(.extendedL2)
        entryBits = isExtended ? 4 : 3
        subclusterBits = isExtended ? clusterBits &- SubclusterBitmap.countBits : clusterBits
        tableBits = clusterBits &- entryBits
        clusterMask = header.clusterByteCount &- 1
        hasDataFile = header.hasDataFile
        sliceBits = min(tableBits, 12 &- entryBits)
        cache = try SliceCache(
            wordBits: Int(sliceBits &+ entryBits &- 3), entryWordBits: Int(entryBits &- 3),
            byteCount: min(cacheByteCount, max(Int(header.l1EntryCount), 1) << Int(clusterBits)),
            of: file.name)
        state = Monitor(State(marks: Array(repeating: [], count: cache.slotCount)))
        // Read before there is a place for it: `deinit` destroys what stands in that place.
        let read = try ClusterMap.readL1Table(
            in: file, offset: header.l1Offset, count: Int(header.l1EntryCount))
        table = .allocate(capacity: 1)
        table.initialize(to: read)
    }

    /// A map without entries: the bytes of a raw disk are where they are.
    package init(ofRawDisk file: HostFile) throws(ImageError) {
        self.file = file
        version = 3
        clusterBits = 16
        tableBits = 13
        clusterMask = 0xffff
        hasDataFile = false
        isExtended = false
        entryBits = 3
        subclusterBits = 16
        sliceBits = 9
        cache = try SliceCache(wordBits: 0, entryWordBits: 0, byteCount: 0)
        state = Monitor(State(marks: []))
        let none = try L1Table(entryCount: 0, offset: 0, in: file)
        table = .allocate(capacity: 1)
        table.initialize(to: none)
    }

    deinit {
        table.deinitialize(count: 1)
        table.deallocate()
    }

    private static func readL1Table(
        in file: HostFile, offset: UInt64, count: Int
    ) throws(ImageError) -> L1Table {
        let table = try L1Table(entryCount: count, offset: offset, in: file)
        try read(table.entries, from: file, at: offset)
        return table
    }

    private static func read(
        _ entries: borrowing AtomicArray, from file: HostFile, at offset: UInt64
    ) throws(ImageError) {
        let chunk = 8192
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: chunk * 8, alignment: 8)
        defer { buffer.deallocate() }
        for first in stride(from: 0, to: entries.count, by: chunk) {
            let part = UnsafeMutableRawBufferPointer(
                rebasing: buffer[..<(min(chunk, entries.count - first) * 8)])
            try file.read(into: part, at: offset &+ UInt64(first) &* 8)
            let bytes = UnsafeRawBufferPointer(part)
            for index in 0..<part.count / 8 {
                entries[first + index].store(
                    bytes.bigEndian(at: index * 8) ?? 0, ordering: .relaxed)
            }
        }
    }

    /// Entries of the L1 table.
    package var l1EntryCount: Int { table.pointee.entries.count }

    @inline(__always)
    package func l1Entry(_ index: Int) -> L1Entry {
        L1Entry(bits: table.pointee.entries[index].load(ordering: .acquiring))
    }

    /// The L1 entry for a guest offset; nothing where the table ends before it.
    func l1Entry(ofGuest guest: UInt64) -> L1Entry {
        let index = Int(truncatingIfNeeded: guest &>> coverageBits)
        return index < l1EntryCount ? l1Entry(index) : L1Entry(bits: 0)
    }

    /// Bytes of the disk that one L2 table describes, as a power of two.
    package var coverageBits: UInt64 { clusterBits &+ tableBits }

    // MARK: Looking up

    /// The longest run from `guest` on, at most `limit` bytes and within one slice, that has one
    /// source.  The caller keeps `guest + limit` inside of the disk.
    @inline(__always)
    package func extent(at guest: UInt64, limit: UInt64) throws(ImageError) -> Extent {
        let cluster = guest &>> clusterBits
        let l1Index = Int(truncatingIfNeeded: cluster &>> tableBits)
        guard l1Index < table.pointee.entries.count else {
            return Extent(.unallocated, byteCount: limit)
        }
        while true {
            let entry = l1Entry(l1Index)
            guard entry.offset != 0, entry.offset & clusterMask == 0 else {
                return withoutTable(entry, l1Index, guest, limit)
            }
            let slice = cluster &>> sliceBits
            let index = Int(truncatingIfNeeded: cluster & (1 &<< sliceBits &- 1))
            if let (slot, version) = cache.find(slice) {
                let extent = run(
                    cache.words(of: slot), index, guest, limit,
                    tableIsCopied: entry.isCopiedAndKnown)
                if cache.isUnchanged(slot, version) { return extent }
                continue
            }
            if let extent = try load(slice, of: entry, l1Index, thenAt: index, guest, limit) {
                return extent
            }
        }
    }

    /// What a guest offset gets whose L1 entry has no table, or a bad one.
    private func withoutTable(
        _ entry: L1Entry, _ l1Index: Int, _ guest: UInt64, _ limit: UInt64
    ) -> Extent {
        var byteCount = 1 &<< coverageBits &- guest & (1 &<< coverageBits &- 1)
        guard entry.offset == 0 else {
            return Extent(.corrupt, host: entry.bits, byteCount: min(byteCount, limit))
        }
        var next = l1Index &+ 1
        while byteCount < limit, next < l1EntryCount, l1Entry(next).offset == 0 {
            byteCount &+= 1 &<< coverageBits  // ends at `limit`, which fits
            next &+= 1
        }
        return Extent(
            .unallocated, byteCount: next == l1EntryCount ? limit : min(byteCount, limit))
    }

    /// The run from `index` of a slice's entries on.
    @inline(__always)
    func run(
        _ entries: UnsafePointer<Atomic<UInt64>>, _ index: Int, _ guest: UInt64, _ limit: UInt64,
        tableIsCopied: Bool
    ) -> Extent {
        if isExtended {
            return extendedRun(entries, index, guest, limit, tableIsCopied: tableIsCopied)
        }
        let entry = L2Entry(bits: entries[index].load(ordering: .relaxed))
        let intoCluster = guest & clusterMask
        let kind =
            hasDataFile
            ? entry.kindWithDataFile(at: guest &- intoCluster)
            : entry.kind(clusterMask: clusterMask, version: version)
        let clusterByteCount = clusterMask &+ 1
        var byteCount = clusterByteCount &- intoCluster
        if kind == .compressed || kind == .corrupt {
            return Extent(kind, host: entry.bits, byteCount: min(byteCount, limit))
        }
        var next = index &+ 1
        let end = 1 &<< Int(sliceBits)
        // Entries of a run of data follow each other by a cluster, in every bit; others are alike.
        let step =
            kind == .data || kind == .zeroAllocated && hasDataFile ? clusterByteCount : 0
        var expected = entry.bits &+ step
        while byteCount < limit, next < end {
            let bits = entries[next].load(ordering: .relaxed)
            if bits != expected {
                guard kind == .zeroAllocated, !hasDataFile,
                    L2Entry(bits: bits).reservedBits == entry.reservedBits,
                    L2Entry(bits: bits).kind(clusterMask: clusterMask, version: version) == kind
                else { break }
            }
            expected &+= step
            byteCount &+= clusterByteCount
            next &+= 1
        }
        return Extent(
            kind, isCopied: tableIsCopied && entry.isCopiedAndKnown,
            host: entry.offset &+ intoCluster,
            byteCount: min(byteCount, limit))
    }
}
