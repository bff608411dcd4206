/// Consecutive host clusters, each standing for one reference.
package struct ClusterRun: Equatable, Sendable {
    /// Index of the first host cluster.
    package var first: UInt64
    package var count: UInt64

    package init(first: UInt64, count: UInt64) {
        self.first = first
        self.count = count
    }

    package var end: UInt64 { first &+ count }
}

extension Array where Element == ClusterRun {
    /// Adds one reference to each cluster of `run`, joined to the last run where it follows it.
    package mutating func append(joining run: ClusterRun) {
        if let last, last.end == run.first {
            self[count - 1].count &+= run.count
        } else {
            append(run)
        }
    }

    /// Adds the references that `entry` holds on host clusters.
    package mutating func append(references entry: L2Entry, clusterBits: UInt64) {
        if entry.isCompressed {
            let bits = UInt32(truncatingIfNeeded: clusterBits)
            let clusters = CompressedDescriptor(entry, clusterBits: bits).hostClusters(
                clusterBits: bits)
            append(
                joining: ClusterRun(
                    first: clusters.lowerBound,
                    count: clusters.upperBound &- clusters.lowerBound &+ 1))
        } else if entry.offset != 0 {
            append(joining: ClusterRun(first: entry.offset &>> clusterBits, count: 1))
        }
    }
}
