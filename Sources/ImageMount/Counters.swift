internal import Glibc
internal import Synchronization

/// What a mount has done since it was made, counted by every request, and whether it still does.
struct Counters: ~Copyable, Sendable {
    /// Set when the images are about to be closed under clients that cannot be waited for.
    let isEnding = Atomic(false)
    let reads = OperationCounter()
    let writes = OperationCounter()
    let flushes = OperationCounter()
    let allocations = OperationCounter()
    let seeks = OperationCounter()

    /// Names and values, for `stats`.
    borrowing func lines() -> [(String, String)] {
        reads.lines("read") + writes.lines("write") + flushes.lines("flush")
            + allocations.lines("allocate") + seeks.lines("seek")
    }
}

/// How often an operation ran, how much it moved and how long it took.
struct OperationCounter: ~Copyable, Sendable {
    private let count = Atomic<UInt64>(0)
    private let byteCount = Atomic<UInt64>(0)
    private let nanoseconds = Atomic<UInt64>(0)
    private let longest = Atomic<UInt64>(0)

    /// A point in time to measure from, in nanoseconds.
    @inline(__always)
    static func now() -> UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(bitPattern: Int64(time.tv_sec)) &* 1_000_000_000
            &+ UInt64(bitPattern: Int64(time.tv_nsec))
    }

    @inline(__always)
    borrowing func add(_ bytes: Int, since start: UInt64) {
        let duration = Self.now() &- start
        count.wrappingAdd(1, ordering: .relaxed)
        byteCount.wrappingAdd(UInt64(clamping: bytes), ordering: .relaxed)
        nanoseconds.wrappingAdd(duration, ordering: .relaxed)
        if duration > longest.load(ordering: .relaxed) {
            longest.max(duration, ordering: .relaxed)
        }
    }

    fileprivate borrowing func lines(_ name: String) -> [(String, String)] {
        [
            ("\(name).count", "\(count.load(ordering: .relaxed))"),
            ("\(name).bytes", "\(byteCount.load(ordering: .relaxed))"),
            ("\(name).nanoseconds", "\(nanoseconds.load(ordering: .relaxed))"),
            ("\(name).longest-nanoseconds", "\(longest.load(ordering: .relaxed))"),
        ]
    }
}
