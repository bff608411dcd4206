/// How often each host cluster is referenced, in two bytes a cluster for those that are.
///
/// Counts are kept in chunks that exist only where something was counted: a sparse file of any
/// length costs no more memory than it has references.
package struct ReferenceCounts: Sendable {
    /// Clusters of a chunk, a power of two.
    private static let chunkBits: UInt64 = 9
    private static let chunkCount = 1 << Int(chunkBits)

    private var chunks: [UInt64: [UInt16]] = [:]
    /// Counts of `UInt16.max` and more; their chunks hold `UInt16.max`.
    private var large: [UInt64: UInt64] = [:]

    package init() {}

    package func count(of cluster: UInt64) -> UInt64 {
        guard let chunk = chunks[cluster >> Self.chunkBits] else { return 0 }
        let count = chunk[Int(cluster & UInt64(Self.chunkCount - 1))]
        return count == .max ? large[cluster] ?? UInt64(count) : UInt64(count)
    }

    /// Adds a reference, and says whether the count was below `maximum` before; otherwise it stays.
    package mutating func add(_ cluster: UInt64, maximum: UInt64) -> Bool {
        let index = Int(cluster & UInt64(Self.chunkCount - 1))
        let chunk = cluster >> Self.chunkBits
        let count = chunks[chunk]?[index] ?? 0
        if count < UInt16.max - 1 {
            if UInt64(count) >= maximum { return false }
            chunks[chunk, default: Array(repeating: 0, count: Self.chunkCount)][index] = count + 1
            return true
        }
        let exact = count == .max ? large[cluster] ?? UInt64(count) : UInt64(count)
        if exact >= maximum { return false }
        chunks[chunk, default: Array(repeating: 0, count: Self.chunkCount)][index] = .max
        large[cluster] = exact + 1
        return true
    }

    /// Calls `body` with every cluster that has a count, and the count, in ascending order.
    package func forEach<Failure: Error>(
        _ body: (_ cluster: UInt64, _ count: UInt64) throws(Failure) -> Void
    ) throws(Failure) {
        for chunk in chunks.keys.sorted() {
            for index in 0..<Self.chunkCount {
                let cluster = chunk << Self.chunkBits | UInt64(index)
                let count = self.count(of: cluster)
                if count > 0 { try body(cluster, count) }
            }
        }
    }

    /// The highest cluster with a count, nil where there is none.
    package var highestCluster: UInt64? {
        // A chunk exists only because a count in it was raised.
        guard let chunk = chunks.keys.max(), let counts = chunks[chunk],
            let index = counts.lastIndex(where: { $0 > 0 })
        else { return nil }
        return chunk << Self.chunkBits | UInt64(index)
    }

    /// The clusters of chunks in which anything was counted, ascending.
    package var touchedRanges: [Range<UInt64>] {
        chunks.keys.sorted().map { $0 << Self.chunkBits..<($0 + 1) << Self.chunkBits }
    }
}
