internal import CTurns
internal import Glibc
internal import Synchronization

/// Runs `body` once on each of `count` threads of its own and returns when all have ended.
///
/// The first error that one of them throws is thrown here, after the others have ended.
package func onThreads(
    _ count: Int, _ body: @escaping @Sendable (Int) throws -> Void
) throws {
    let jobs = (0..<count).map { ThreadJob(index: $0, body) }
    let threads = jobs.map { job in
        var thread = pthread_t()
        let code = pthread_create(
            &thread, nil,
            { argument in
                Unmanaged<ThreadJob>.fromOpaque(argument!).takeRetainedValue().run()
                return nil
            }, Unmanaged.passRetained(job).toOpaque())
        precondition(code == 0, "no thread: \(String(cString: strerror(code)))")
        return thread
    }
    for thread in threads { pthread_join(thread, nil) }
    for job in jobs { if let error = job.error { throw error } }
}

private final class ThreadJob: Sendable {
    private let index: Int
    private let body: @Sendable (Int) throws -> Void
    private let failure = Mutex<(any Error)?>(nil)

    init(index: Int, _ body: @escaping @Sendable (Int) throws -> Void) {
        (self.index, self.body) = (index, body)
    }

    var error: (any Error)? { failure.withLock { $0 } }

    func run() {
        do { try body(index) } catch { failure.withLock { $0 = error } }
    }
}

/// Runs `body` so that of its thread and of all that it starts only one runs at a time, and `seed`
/// alone decides which: another run with the same seed is the same run.
///
/// Threads are exchanged where one waits, at each call of a yielding `RecordingDevice`, and here
/// and there where one lets go of a lock.  A deadlock ends the program with a message that has the
/// seed.
package func takingTurns<Result>(seed: UInt64, _ body: () throws -> Result) rethrows -> Result {
    turns_begin(seed)
    defer { _ = turns_end() }
    return try body()
}

/// Lets another thread have its turn; false where threads take no turns.
@discardableResult
package func passTurn() -> Bool { turns_pass() }

/// Runs `body` with a system that reads and writes less than asked, or is interrupted.
package func withShortTransfers(_ body: () throws -> Void) rethrows {
    transfers_be_short(true)
    defer { transfers_be_short(false) }
    try body()
}
