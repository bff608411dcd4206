internal import Glibc

/// State with the one lock that guards it and a condition to wait for its changes.
package struct Monitor<State: ~Copyable>: ~Copyable, @unchecked Sendable {
    private let mutex: UnsafeMutablePointer<pthread_mutex_t>
    private let changed: UnsafeMutablePointer<pthread_cond_t>
    private let state: UnsafeMutablePointer<State>

    package init(_ initial: consuming State) {
        mutex = .allocate(capacity: 1)
        pthread_mutex_init(mutex, nil)
        changed = .allocate(capacity: 1)
        pthread_cond_init(changed, nil)
        state = .allocate(capacity: 1)
        state.initialize(to: initial)
    }

    deinit {
        pthread_cond_destroy(changed)
        pthread_mutex_destroy(mutex)
        state.deinitialize(count: 1)
        state.deallocate()
        changed.deallocate()
        mutex.deallocate()
    }

    @inline(__always)
    package borrowing func withLock<Result, Failure: Error>(
        _ body: (inout State) throws(Failure) -> Result
    ) throws(Failure) -> Result {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        return try body(&state.pointee)
    }

    /// Tries `body` until it answers, waiting for `announceChange` between two tries.
    ///
    /// The state is not borrowed while waiting: other threads change it meanwhile.
    package borrowing func waitFor<Result, Failure: Error>(
        _ body: (inout State) throws(Failure) -> Result?
    ) throws(Failure) -> Result {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        while true {
            if let result = try body(&state.pointee) { return result }
            pthread_cond_wait(changed, mutex)
        }
    }

    /// Waits until `body` answers true or `seconds` have passed.
    package borrowing func wait(seconds: Double, until body: (inout State) -> Bool) {
        var deadline = timespec()
        clock_gettime(CLOCK_REALTIME, &deadline)
        let nanoseconds = deadline.tv_nsec + Int(seconds.truncatingRemainder(dividingBy: 1) * 1e9)
        deadline.tv_sec += Int(seconds) + nanoseconds / 1_000_000_000
        deadline.tv_nsec = nanoseconds % 1_000_000_000
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        while !body(&state.pointee) {
            if pthread_cond_timedwait(changed, mutex, &deadline) != 0 { return }
        }
    }

    /// Wakes everybody who waits for a change of the state.
    package borrowing func announceChange() { pthread_cond_broadcast(changed) }
}
