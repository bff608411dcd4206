internal import Synchronization

/// What clients change in a session, once for each granularity that an enabled bitmap has.
///
/// An image without such bitmaps pays a load and a branch for each request.
struct DirtyTracker: ~Copyable, @unchecked Sendable {
    /// Marks that several bitmaps may share; at a fixed address for as long as somebody holds it.
    final class Marks: Sendable {
        nonisolated(unsafe) let pointer: UnsafeMutablePointer<DirtyMarks>

        init(granularityBits: UInt8) throws(ImageError) {
            let marks = try DirtyMarks(granularityBits: granularityBits)
            pointer = .allocate(capacity: 1)
            pointer.initialize(to: marks)
        }

        deinit {
            pointer.deinitialize(count: 1)
            pointer.deallocate()
        }
    }

    // `@unchecked`: written once, before `count` says so.
    private let all: UnsafeMutablePointer<UnsafeMutablePointer<DirtyMarks>>
    private let count = Atomic<Int>(0)
    private let owners = Monitor<[Marks]>([])

    init() { all = .allocate(capacity: Limits.bitmapGranularityBits.count) }

    deinit { all.deallocate() }

    /// Begins to record, at each of the granularities (each once); before the first write.
    borrowing func start(_ marks: [Marks]) {
        precondition(marks.count <= Limits.bitmapGranularityBits.count, "one per granularity")
        owners.withLock { $0 = marks }
        for (index, marks) in marks.enumerated() { (all + index).initialize(to: marks.pointer) }
        count.store(marks.count, ordering: .releasing)
    }

    /// Records that a client is about to change bytes `offset ..< offset + byteCount`.
    @inline(__always)
    borrowing func record(_ offset: UInt64, _ byteCount: UInt64) {
        let count = count.load(ordering: .acquiring)  // pairs with the store in `start`
        if count != 0, byteCount != 0 { record(offset, byteCount, count) }
    }

    private borrowing func record(_ offset: UInt64, _ byteCount: UInt64, _ count: Int) {
        for index in 0..<count { all[index].pointee.mark(offset, byteCount) }
    }
}
