internal import Synchronization

/// Keeps threads that share a model away from each other's bytes.
package final class RangeReservations: Sendable {
    private let taken = Mutex<[Range<Int>]>([])

    package init() {}

    /// Runs `body` with `range` reserved; nil, and nothing run, where a part of it is taken.
    package func with<Result>(
        _ range: Range<Int>, _ body: () throws -> Result
    ) rethrows -> Result? {
        let isMine = taken.withLock { taken in
            guard !taken.contains(where: { $0.overlaps(range) }) else { return false }
            taken.append(range)
            return true
        }
        guard isMine else { return nil }
        defer { taken.withLock { taken in taken.removeAll { $0 == range } } }
        return try body()
    }
}
