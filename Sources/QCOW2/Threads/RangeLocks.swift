internal import Glibc

/// Locks on guest ranges: shared for reads and in-place writes, exclusive for whatever changes
/// where a cluster is.
///
/// The disk is cut into groups of 1 MiB (or a cluster, where that is larger), and the groups share
/// a fixed number of locks.  A range of at most two groups is locked at once, lower lock first.
package struct RangeLocks: ~Copyable, @unchecked Sendable {
    private static let count = 1024
    /// A lock on a cache line of its own.
    private static let stride = 64

    private let memory: UnsafeMutableRawPointer
    private let groupBits: UInt64

    package init(clusterBits: UInt32) {
        precondition(
            MemoryLayout<pthread_rwlock_t>.size <= RangeLocks.stride, "a lock fits its line")
        groupBits = UInt64(max(clusterBits, 20))
        memory = .allocate(
            byteCount: RangeLocks.count * RangeLocks.stride, alignment: RangeLocks.stride)
        var attributes = pthread_rwlockattr_t()
        pthread_rwlockattr_init(&attributes)
        // Readers never lock twice, and a flood of them must not starve a writer.
        pthread_rwlockattr_setkind_np(
            &attributes, Int32(PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP))
        for index in 0..<RangeLocks.count { pthread_rwlock_init(lock(index), &attributes) }
        pthread_rwlockattr_destroy(&attributes)
    }

    deinit {
        for index in 0..<RangeLocks.count { pthread_rwlock_destroy(lock(index)) }
        memory.deallocate()
    }

    /// Bytes of a group.
    package var groupByteCount: UInt64 { 1 &<< groupBits }

    /// The end of the group that `offset` is in.
    @inline(__always)
    package func groupEnd(of offset: UInt64) -> UInt64 { (offset &>> groupBits &+ 1) &<< groupBits }

    /// Which locks stand for a range of at most two groups.
    package struct Held {
        fileprivate let first: Int
        fileprivate let second: Int
    }

    @inline(__always)
    package borrowing func lockShared(_ offset: UInt64, _ byteCount: UInt64) -> Held {
        let held = locks(offset, byteCount)
        pthread_rwlock_rdlock(lock(held.first))
        if held.second != held.first { pthread_rwlock_rdlock(lock(held.second)) }
        return held
    }

    @inline(__always)
    package borrowing func lockExclusive(_ offset: UInt64, _ byteCount: UInt64) -> Held {
        let held = locks(offset, byteCount)
        pthread_rwlock_wrlock(lock(held.first))
        if held.second != held.first { pthread_rwlock_wrlock(lock(held.second)) }
        return held
    }

    @inline(__always)
    package borrowing func unlock(_ held: Held) {
        pthread_rwlock_unlock(lock(held.first))
        if held.second != held.first { pthread_rwlock_unlock(lock(held.second)) }
    }

    /// Stops the world: every request in flight has ended when this returns.
    package borrowing func lockEverything() {
        for index in 0..<RangeLocks.count { pthread_rwlock_wrlock(lock(index)) }
    }

    package borrowing func unlockEverything() {
        for index in 0..<RangeLocks.count { pthread_rwlock_unlock(lock(index)) }
    }

    @inline(__always)
    private func locks(_ offset: UInt64, _ byteCount: UInt64) -> Held {
        let first = offset &>> groupBits
        let last = (offset &+ max(byteCount, 1) &- 1) &>> groupBits
        assert(last &- first <= 1, "at most two groups at once")
        let a = Int(truncatingIfNeeded: first) & (RangeLocks.count - 1)
        let b = Int(truncatingIfNeeded: last) & (RangeLocks.count - 1)
        return Held(first: min(a, b), second: max(a, b))
    }

    @inline(__always)
    private func lock(_ index: Int) -> UnsafeMutablePointer<pthread_rwlock_t> {
        (memory + index &* RangeLocks.stride).assumingMemoryBound(to: pthread_rwlock_t.self)
    }
}
