/// How often each host cluster is referenced, in two bytes a cluster for those that are.
///
/// Counts are kept in chunks that exist only where something was counted: a sparse file of any
/// length costs no more memory than it has references.
package struct ReferenceCounts: Sendable {
    /// Clusters of a chunk, a power of two.
    private static let chunkBits: UInt64 = 9
    private static let chunkCount = 1 << Int(chunkBits)

    private var chunks: [[UInt16]] = []
    /// Which of `chunks` has the counts of a group of clusters.
    private var slots: [UInt64: Int] = [:]
    /// The group that was counted last, and its slot: mostly the next one is the same.
    private var latest = (group: UInt64.max, slot: 0)
    /// Counts of `UInt16.max` and more; their chunks hold `UInt16.max`.
    private var large: [UInt64: UInt64] = [:]
    /// Clusters with more references than their count says, because it can hold no more.
    private var exceeded: Set<UInt64> = []

    package init() {}

    private static func place(of cluster: UInt64) -> (group: UInt64, index: Int) {
        (cluster >> chunkBits, Int(cluster & UInt64(chunkCount - 1)))
    }

    package func count(of cluster: UInt64) -> UInt64 {
        let (group, index) = Self.place(of: cluster)
        guard let slot = group == latest.group ? latest.slot : slots[group] else { return 0 }
        let count = chunks[slot][index]
        return count == .max ? large[cluster] ?? UInt64(count) : UInt64(count)
    }

    /// Whether a cluster has more than one reference.
    func isShared(_ cluster: UInt64) -> Bool {
        count(of: cluster) > 1 || hasMoreThanCounted(cluster)
    }

    /// Whether a cluster has references that its count could not hold.
    func hasMoreThanCounted(_ cluster: UInt64) -> Bool { exceeded.contains(cluster) }

    /// What `count(of:)` says of clusters most of which lie behind one another.
    struct Reader {
        fileprivate let counts: ReferenceCounts
        private var chunk: [UInt16]?
        private var group = UInt64.max

        fileprivate init(_ counts: ReferenceCounts) { self.counts = counts }

        mutating func count(of cluster: UInt64) -> UInt64 {
            let (group, index) = ReferenceCounts.place(of: cluster)
            if group != self.group {
                self.group = group
                chunk = counts.slots[group].map { counts.chunks[$0] }
            }
            guard let chunk else { return 0 }
            return chunk[index] == .max ? counts.count(of: cluster) : UInt64(chunk[index])
        }
    }

    var reader: Reader { Reader(self) }

    /// Adds a reference, and says whether the count was below `maximum` before, which is not 0;
    /// otherwise it stays.
    package mutating func add(_ cluster: UInt64, maximum: UInt64) -> Bool {
        let (group, index) = Self.place(of: cluster)
        if group != latest.group { latest = (group, slot(of: group)) }
        let count = chunks[latest.slot][index]
        let exact = count == .max ? large[cluster] ?? UInt64(count) : UInt64(count)
        guard exact < maximum else {
            exceeded.insert(cluster)
            return false
        }
        if count < UInt16.max - 1 {
            chunks[latest.slot][index] = count + 1
        } else {
            chunks[latest.slot][index] = .max
            large[cluster] = exact + 1
        }
        return true
    }

    private mutating func slot(of group: UInt64) -> Int {
        if let slot = slots[group] { return slot }
        slots[group] = chunks.count
        chunks.append(Array(repeating: 0, count: Self.chunkCount))
        return chunks.count - 1
    }

    /// Calls `body` with every cluster that has a count, and the count, in ascending order.
    package func forEach<Failure: Error>(
        _ body: (_ cluster: UInt64, _ count: UInt64) throws(Failure) -> Void
    ) throws(Failure) {
        var reader = reader
        for range in touchedRanges {
            for cluster in range {
                let count = reader.count(of: cluster)
                if count > 0 { try body(cluster, count) }
            }
        }
    }

    /// The highest cluster with a count, nil where there is none.
    package var highestCluster: UInt64? {
        // A chunk exists only because a count in it was raised.
        guard let (group, slot) = slots.max(by: { $0.key < $1.key }),
            let index = chunks[slot].lastIndex(where: { $0 > 0 })
        else { return nil }
        return group << Self.chunkBits | UInt64(index)
    }

    /// The clusters of chunks in which anything was counted, ascending.
    package var touchedRanges: [Range<UInt64>] {
        slots.keys.sorted().map { $0 << Self.chunkBits..<($0 + 1) << Self.chunkBits }
    }
}
