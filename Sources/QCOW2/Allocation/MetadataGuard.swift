internal import Synchronization

/// Which host clusters hold metadata: no write of guest data may land there, whatever an entry
/// says.
///
/// A filter answers "no" for nearly every cluster with one load; only where it says "perhaps" are
/// the tables themselves asked.  Clusters are never taken out of the filter.
package final class MetadataGuard: Sendable {
    private let filter: AtomicArray
    private let clusterBits: UInt64
    private let map: ClusterMap
    /// Tables that stay where they are, or move rarely; and refcount blocks.
    private let known: Monitor<Known>

    private struct Known {
        var tables: [ClusterRun] = []
        var refcountBlocks: Set<UInt64> = []
        /// A refcount block under two entries of the refcount table.
        var sharedBlock: UInt64?
        /// Clusters that were L2 tables at some time; those that an image came with are among them
        /// as soon as it was asked for one.
        var l2Tables: Set<UInt64> = []
        var hasFirstTables = false
    }

    /// - Parameter tableCount: about how many L2 tables and refcount blocks there are.
    package init(map: ClusterMap, tableCount: Int) throws(ImageError) {
        self.map = map
        clusterBits = map.clusterBits
        var words = 1 << 14  // 2^20 clusters are told apart exactly
        while words < tableCount, words < 1 << 19 { words *= 2 }
        filter = try AtomicArray(count: words, for: "the places of tables")
        known = Monitor(Known())
        for cluster in map.l1Clusters.first..<map.l1Clusters.end { mark(cluster) }
        for index in 0..<map.l1EntryCount where map.l1Entry(index).offset != 0 {
            mark(map.l1Entry(index).offset &>> clusterBits)
        }
    }

    /// Adds a table that a header, a snapshot or a bitmap points to.
    package func add(_ table: ClusterRun) {
        known.withLock { $0.tables.append(table) }
        for cluster in table.first..<table.end { mark(cluster) }
    }

    package func remove(_ table: ClusterRun) {
        known.withLock { $0.tables.removeAll { $0 == table } }
    }

    package func addRefcountBlock(_ cluster: UInt64) {
        known.withLock {
            if !$0.refcountBlocks.insert(cluster).inserted { $0.sharedBlock = cluster }
        }
        mark(cluster)
    }

    /// Takes a block out that was never made known.
    package func removeRefcountBlock(_ cluster: UInt64) {
        known.withLock { _ = $0.refcountBlocks.remove(cluster) }
    }

    /// Adds an L2 table, which the map knows by itself.
    package func addTable(_ cluster: UInt64) {
        known.withLock { _ = $0.l2Tables.insert(cluster) }
        mark(cluster)
    }

    /// Whether any cluster of host bytes `offset ..< offset + byteCount` is metadata.
    @inline(__always)
    package func overlaps(_ offset: UInt64, _ byteCount: UInt64) -> Bool {
        var cluster = offset &>> clusterBits
        let last = (offset &+ byteCount &- 1) &>> clusterBits
        while cluster <= last {
            if isMarked(cluster), isMetadata(cluster) { return true }
            cluster &+= 1
        }
        return false
    }

    /// Whether the cluster is metadata, or one of a few others; one load.
    @inline(__always)
    func isMarked(_ cluster: UInt64) -> Bool {
        let bit = Int(truncatingIfNeeded: cluster) & (filter.count &* 64 &- 1)
        return cluster == 0
            || filter[bit &>> 6].load(ordering: .relaxed) &>> UInt64(bit & 63) & 1 != 0
    }

    private func mark(_ cluster: UInt64) {
        let bit = Int(truncatingIfNeeded: cluster) & (filter.count &* 64 &- 1)
        filter[bit &>> 6].bitwiseOr(1 &<< UInt64(bit & 63), ordering: .relaxed)
    }

    @inline(never)
    package func isMetadata(_ cluster: UInt64) -> Bool {
        if cluster == 0 { return true }
        if isKnown(cluster) { return true }
        let l1 = map.l1Clusters
        if l1.first <= cluster, cluster < l1.end { return true }
        guard wasTable(cluster) else { return false }
        let offset = cluster &<< clusterBits
        for index in 0..<map.l1EntryCount where map.l1Entry(index).offset == offset { return true }
        return false
    }

    /// Whether the cluster is an L2 table, or was one.  Without it, each cluster that a long L1
    /// table has left would cost a look at all of its entries.
    private func wasTable(_ cluster: UInt64) -> Bool {
        known.withLock { known in
            if !known.hasFirstTables {
                for index in 0..<map.l1EntryCount where map.l1Entry(index).offset != 0 {
                    known.l2Tables.insert(map.l1Entry(index).offset &>> clusterBits)
                }
                known.hasFirstTables = true
            }
            return known.l2Tables.contains(cluster)
        }
    }

    /// Whether the L2 table at `offset` lies on other metadata, or under two L1 entries.
    package func collides(tableAt offset: UInt64) -> Bool {
        let cluster = offset &>> clusterBits
        if cluster == 0 || isKnown(cluster) { return true }
        let l1 = map.l1Clusters
        if l1.first <= cluster, cluster < l1.end { return true }
        var count = 0
        for index in 0..<map.l1EntryCount where map.l1Entry(index).offset == offset { count += 1 }
        return count > 1
    }

    private func isKnown(_ cluster: UInt64) -> Bool {
        known.withLock { known in
            known.refcountBlocks.contains(cluster)
                || known.tables.contains { $0.first <= cluster && cluster < $0.end }
        }
    }

    /// Refcount blocks and tables that lie on one another; nil when all is well.
    package func collision() -> UInt64? {
        known.withLock { known in
            if let block = known.sharedBlock { return block }
            var tables = known.tables
            if map.l1Clusters.count > 0 { tables.append(map.l1Clusters) }
            tables.sort { $0.first < $1.first }
            for (table, next) in zip(tables, tables.dropFirst()) where table.end > next.first {
                return next.first
            }
            if let first = tables.first, first.first == 0 { return 0 }
            for block in known.refcountBlocks {
                if block == 0 || tables.contains(where: { $0.first <= block && block < $0.end }) {
                    return block
                }
            }
            return nil
        }
    }
}
