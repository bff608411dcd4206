/// Clusters past the end of the file that something refers to, in a file that was cut short mostly.
///
/// They have no space, and read as zeros; nobody may get them for something else.
struct ReferencesPastTheEnd: Sendable {
    /// Ranges of clusters as they were met; they may overlap.
    private var met: [Range<UInt64>] = []

    mutating func add(_ clusters: Range<UInt64>) {
        // Where there are very many, the last covers what follows, with what lies between.
        guard let last = met.last,
            last.upperBound == clusters.lowerBound || met.count >= 1 << 16
        else { return met.append(clusters) }
        met[met.count - 1] =
            min(last.lowerBound, clusters.lowerBound)..<max(last.upperBound, clusters.upperBound)
    }

    /// The clusters in ascending ranges, none of which touches another.
    var merged: [Range<UInt64>] { met.merged }
}

extension [Range<UInt64>] {
    /// The same in ascending order, none of which touches another.
    var merged: [Range<UInt64>] {
        var merged: [Range<UInt64>] = []
        for range in sorted(by: { $0.lowerBound < $1.lowerBound }) {
            if let last = merged.last, range.lowerBound <= last.upperBound {
                let end = Swift.max(last.upperBound, range.upperBound)
                merged[merged.count - 1] = last.lowerBound..<end
            } else {
                merged.append(range)
            }
        }
        return merged
    }

    /// Whether one of the ranges, which are merged, has `cluster`.
    func haveCluster(_ cluster: UInt64) -> Bool {
        var (low, high) = (0, count)
        while low < high {
            let middle = (low + high) / 2
            if self[middle].upperBound <= cluster { low = middle + 1 } else { high = middle }
        }
        return low < count && self[low].contains(cluster)
    }
}
