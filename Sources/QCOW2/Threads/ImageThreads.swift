internal import Glibc

/// Threads that may block: a server reads and writes images on them, and Swift's own go on.
///
/// ```swift
/// let threads = try ImageThreads(count: 8)
/// let bytes = try await threads.run { () throws(ImageError) in
///     try image.read(at: 0, count: 4096)
/// }
/// ```
///
/// It is a task executor, too: `withTaskExecutorPreference(threads)` runs a whole task there.  The
/// threads end when the last reference to them is gone and all work is done.
public final class ImageThreads: TaskExecutor {
    private let queue = Queue()

    /// Starts the threads.
    ///
    /// - Parameter count: how many calls may block at once; one at least, whatever it says.
    /// - Throws: what `pthread_create` answers, EAGAIN where there are too many threads.
    public init(count: Int) throws(SystemError) {
        for _ in 0..<max(count, 1) {
            let queue = queue
            guard Worker.start({ queue.work() }) != nil else {
                let error = SystemError.last
                queue.end()
                throw error
            }
        }
    }

    deinit { queue.end() }

    /// Runs `body` on one of the threads, and waits for it without blocking a thread of Swift's.
    ///
    /// - Throws: what `body` throws.
    public func run<Result: Sendable, Failure: Error>(
        _ body: @escaping @Sendable () throws(Failure) -> Result
    ) async throws(Failure) -> Result {
        try await withTaskExecutorPreference(self) { () async throws(Failure) in try body() }
    }

    /// Takes a part of a task to run; Swift's tasks call it.
    public func enqueue(_ job: consuming ExecutorJob) {
        queue.add(UnownedJob(job), for: asUnownedTaskExecutor())
    }
}

/// What waits to be run, first come, first served.
private final class Queue: Sendable {
    private struct State {
        var jobs: [(job: UnownedJob, executor: UnownedTaskExecutor)] = []
        /// How many of `jobs` were taken.
        var taken = 0
        var isEnded = false

        mutating func next() -> (job: UnownedJob, executor: UnownedTaskExecutor)? {
            guard taken < jobs.count else { return nil }
            defer {
                taken += 1
                if taken * 2 > jobs.count {
                    jobs.removeFirst(taken)
                    taken = 0
                }
            }
            return jobs[taken]
        }
    }

    private let state = Monitor(State())

    func add(_ job: UnownedJob, for executor: UnownedTaskExecutor) {
        state.withLock { $0.jobs.append((job, executor)) }
        state.announceChange()
    }

    func end() {
        state.withLock { $0.isEnded = true }
        state.announceChange()
    }

    /// Runs jobs until the end.  Their tasks keep the executor; when none is left, it may be gone.
    func work() {
        while let (job, executor) = next() { job.runSynchronously(on: executor) }
    }

    private func next() -> (job: UnownedJob, executor: UnownedTaskExecutor)? {
        state.waitFor { state in
            if let next = state.next() { return .some(next) }
            return state.isEnded ? .some(nil) : nil
        }
    }
}
