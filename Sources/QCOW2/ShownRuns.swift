/// Where the layers below an image had data when that was counted.
///
/// What a file system calls a hole of a raw file may be data once it was read: in a file on tmpfs,
/// or one with space that was reserved.  What is taken off a sum must be what was added to it.
package struct ShownRuns {
    /// Runs that are kept; behind them each question goes to the file system again.
    private static let limit = 1 << 18

    private var runs: [Range<UInt64>] = []
    /// The end of what is known, in guest bytes.
    private var end: UInt64 = 0

    package init() {}

    /// Whether not everything that was counted is known.
    package var isFull: Bool { runs.count >= Self.limit }

    /// Keeps what comes next.
    package mutating func keep(_ range: Range<UInt64>, isHole: Bool) {
        guard !isFull, range.lowerBound == end else { return }
        end = range.upperBound
        if isHole { return }
        if let last = runs.last, last.upperBound == range.lowerBound {
            runs[runs.count - 1] = last.lowerBound..<range.upperBound
        } else {
            runs.append(range)
        }
    }

    /// Whether the bytes from `offset` on were a hole, and for how many, at most `limit`; nil where
    /// that is not known.
    package func holeOrData(
        at offset: UInt64, limit: UInt64
    ) -> (isHole: Bool, byteCount: UInt64)? {
        guard offset < end else { return nil }
        var (low, high) = (0, runs.count)
        while low < high {
            let middle = (low + high) / 2
            if runs[middle].upperBound <= offset { low = middle + 1 } else { high = middle }
        }
        let isData = low < runs.count && runs[low].contains(offset)
        let next = low == runs.count ? end : isData ? runs[low].upperBound : runs[low].lowerBound
        return (!isData, min(next &- offset, limit))
    }
}
