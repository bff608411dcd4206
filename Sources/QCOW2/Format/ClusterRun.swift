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
}
