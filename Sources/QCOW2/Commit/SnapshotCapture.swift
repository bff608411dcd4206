internal import Synchronization

/// A snapshot in the making, beside clients that go on writing.
///
/// Tables get their second reference one after the other, in the order of the disk.  What clients
/// change in front of the boundary they change for the disk alone; behind it, for the snapshot
/// too: the snapshot is what the disk is when the world stops for it, whatever was counted before.
/// A new entry behind the boundary is never COPIED, its cluster has a second reference to get, and
/// the cluster that it replaces a second one to lose.
package final class SnapshotCapture: Sendable {
    /// Guest clusters below this one are counted; moves under the lock of the cluster map.
    private let boundary = Atomic<UInt64>(0)
    /// L2 tables below this L1 index are counted; moves under the lock for replacing tables.
    private let tableBoundary = Atomic<Int>(0)
    private let changes = Monitor(Changes())

    /// References that changed behind the boundary.
    package struct Changes: Sendable {
        /// To be raised.
        package var gained: [ClusterRun] = []
        /// To be dropped.
        package var lost: [ClusterRun] = []

        package init() {}
    }

    package init() {}

    /// Whether guest cluster `cluster` (an index) is counted for a snapshot.
    @inline(__always)
    package func covers(_ cluster: UInt64) -> Bool {
        cluster < boundary.load(ordering: .relaxed)
    }

    @inline(__always)
    package func covers(table index: Int) -> Bool {
        index < tableBoundary.load(ordering: .acquiring)
    }

    package var coveredClusterCount: UInt64 { boundary.load(ordering: .relaxed) }
    package var coveredTableCount: Int { tableBoundary.load(ordering: .acquiring) }

    package func cover(upTo cluster: UInt64) { boundary.store(cluster, ordering: .relaxed) }
    package func cover(tablesUpTo index: Int) { tableBoundary.store(index, ordering: .releasing) }

    /// The snapshot is there, or given up.
    package func end() {
        cover(upTo: 0)
        cover(tablesUpTo: 0)
        changes.withLock { $0 = Changes() }
    }

    /// `old` is replaced by `new` behind the boundary; returns what to store instead of `new`.
    package func follow(_ old: L2Entry, _ new: L2Entry, clusterBits: UInt64) -> L2Entry {
        if old.isCompressed || new.isCompressed || old.offset != new.offset {
            changes.withLock {
                $0.lost.append(references: old, clusterBits: clusterBits)
                $0.gained.append(references: new, clusterBits: clusterBits)
            }
        }
        return new.isCompressed ? new : new.withoutCopied
    }

    /// The table at host cluster `old`, nil for none, was replaced by the one at `new`.
    package func followTable(_ old: UInt64?, _ new: UInt64) {
        changes.withLock {
            if let old { $0.lost.append(joining: ClusterRun(first: old, count: 1)) }
            $0.gained.append(joining: ClusterRun(first: new, count: 1))
        }
    }

    package func takeChanges() -> Changes {
        changes.withLock { changes in
            defer { changes = Changes() }
            return changes
        }
    }

    package func putBack(_ taken: Changes) {
        changes.withLock {
            $0.gained += taken.gained
            $0.lost += taken.lost
        }
    }
}
