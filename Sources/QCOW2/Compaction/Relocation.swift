/// Where clusters and streams have gone, for the tables that lead to them.
struct Relocation {
    /// Clusters by their old places, ascending; neighbours that stay neighbours are one.
    private let moves: [CompactionPlan.Move]
    private let streams: [StreamMove]
    /// L2 tables that are given up, by host offset.
    private let emptyTables: Set<UInt64>
    private let clusterBits: UInt64

    init(
        _ moves: [CompactionPlan.Move], _ streams: [StreamMove], emptyTables: Set<UInt64>,
        clusterBits: UInt64
    ) {
        var joined: [CompactionPlan.Move] = []
        for move in moves.sorted(by: { $0.source < $1.source }) {
            if let last = joined.last, last.source &+ last.count == move.source,
                last.target &+ last.count == move.target
            {
                joined[joined.count - 1].count &+= move.count
            } else {
                joined.append(move)
            }
        }
        self.moves = joined
        self.streams = streams.sorted { $0.stream.offset < $1.stream.offset }
        self.emptyTables = emptyTables
        self.clusterBits = clusterBits
    }

    var isEmpty: Bool { moves.isEmpty && streams.isEmpty && emptyTables.isEmpty }

    /// Clusters that went as they were.
    var movedClusterCount: UInt64 { moves.reduce(0) { $0 &+ $1.count } }

    /// The highest cluster that something went to; 0 where nothing did.
    var highestTarget: UInt64 {
        let clusters = moves.lazy.map { $0.target &+ $0.count &- 1 }.max() ?? 0
        let streams = streams.lazy.map { $0.targetClusters(clusterBits: clusterBits).upperBound }
        return max(clusters, streams.max() ?? 0)
    }

    /// Where a cluster is now.
    func place(of cluster: UInt64) -> UInt64 {
        guard let first = moves.first, cluster >= first.source else { return cluster }
        let move = moves[moves.lastOfFront(where: { $0.source <= cluster })]
        return cluster < move.source &+ move.count
            ? move.target &+ (cluster &- move.source) : cluster
    }

    /// Where what began at a host offset begins now.
    func place(ofOffset offset: UInt64) -> UInt64 {
        let cluster = offset &>> clusterBits
        return place(of: cluster) &<< clusterBits | offset & (1 &<< clusterBits &- 1)
    }

    // MARK: Entries

    func entry(_ entry: L1Entry) -> L1Entry {
        if emptyTables.contains(entry.offset) { return L1Entry(bits: 0) }
        let flags = entry.bits & ~L1Entry.offsetMask
        return L1Entry(bits: flags | place(ofOffset: entry.offset))
    }

    /// The first word of an L2 entry, whose flags stay.
    func entry(_ entry: L2Entry) -> UInt64 {
        guard entry.isCompressed else {
            return entry.bits & ~L2Entry.offsetMask | place(ofOffset: entry.offset)
        }
        let bits = UInt32(truncatingIfNeeded: clusterBits)
        let old = CompressedDescriptor(entry, clusterBits: bits).offset
        // The place in the sector is the same, so the number of sectors is.
        return entry.bits &- old &+ place(ofStreamAt: old)
    }

    private func place(ofStreamAt offset: UInt64) -> UInt64 {
        guard let first = streams.first, offset >= first.stream.offset else { return offset }
        let found = streams[
            streams.lastOfFront(where: { $0.stream.offset <= offset })]
        return found.stream.offset == offset ? found.target : offset
    }

    func entry(_ entry: RefcountTableEntry) -> RefcountTableEntry {
        RefcountTableEntry(bits: place(ofOffset: entry.offset) | entry.reservedBits)
    }

    func entry(_ entry: BitmapTableEntry) -> BitmapTableEntry {
        BitmapTableEntry(bits: entry.bits &- entry.offset &+ place(ofOffset: entry.offset))
    }
}

extension Array {
    /// The index of the last of those at the front that `belongs` is true of, in which
    /// there is one, and of nobody behind.
    fileprivate func lastOfFront(where belongs: (Element) -> Bool) -> Int {
        var (low, high) = (0, count)
        while low < high {
            let middle = (low + high) / 2
            if belongs(self[middle]) { low = middle + 1 } else { high = middle }
        }
        return low - 1
    }
}
