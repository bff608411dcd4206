internal import Glibc
internal import QCOW2
internal import Synchronization

/// Starts a thread that nobody waits for.
///
/// - Parameter name: what the thread is called in `ps`, at most 15 bytes.
func startThread(_ name: String, _ body: @escaping @Sendable () -> Void) throws(MountError) {
    let work = Unmanaged.passRetained(ThreadWork(name: name, body: body))
    var thread = pthread_t()
    let code = pthread_create(
        &thread, nil,
        { context in
            guard let context else { return nil }
            let work = Unmanaged<ThreadWork>.fromOpaque(context).takeRetainedValue()
            pthread_setname_np(pthread_self(), work.name)
            work.body()
            return nil
        }, work.toOpaque())
    guard code == 0 else {
        work.release()
        throw MountError("", "no thread can be started: \(SystemError(code: code))")
    }
    pthread_detach(thread)
}

/// A thread that shares no descriptor with the others, for whatever waits for our own mount.
///
/// A killed process lets go of /dev/fuse when the last thread that shares its descriptors has
/// ended.  A thread that waits for our own mount ends when it is answered, or when the connection
/// has ended: with shared descriptors, never.
final class OutsideThread: Sendable {
    private let exchange = Exchange()

    private final class Exchange: Sendable {
        let work = Mutex<(@Sendable () -> Void)?>(nil)
        let isAsked = Semaphore()
        let isDone = Semaphore()
    }

    init() throws(MountError) {
        try startThread("outside") { [exchange] in
            // Kernels before 5.9 do not know it: then the thread is one like the others.
            _ = close_range(3, .max, Int32(CLOSE_RANGE_UNSHARE))
            while true {
                exchange.isAsked.wait()
                guard let work = exchange.work.withLock({ $0.take() }) else { return }
                work()
                exchange.isDone.post()
            }
        }
    }

    deinit { exchange.isAsked.post() }

    /// Runs `body` and returns what it returned; for one caller at a time.
    ///
    /// - Parameter body: opens what it needs: only the standard streams are open in it.
    func run<Result: Sendable>(_ body: @escaping @Sendable () -> Result) -> Result? {
        let outcome = Outcome<Result>()
        exchange.work.withLock { $0 = { outcome.result.withLock { $0 = body() } } }
        exchange.isAsked.post()
        exchange.isDone.wait()
        return outcome.result.withLock { $0 }
    }
}

/// What a thread leaves for the one that waits for it.
private final class Outcome<Result: Sendable>: Sendable {
    let result = Mutex<Result?>(nil)
}

private final class ThreadWork: Sendable {
    let name: String
    let body: @Sendable () -> Void

    init(name: String, body: @escaping @Sendable () -> Void) {
        self.name = name
        self.body = body
    }
}

/// A counter that threads wait for to be more than zero.
final class Semaphore: @unchecked Sendable {
    // Sendable: the semaphore is made for threads, and its address never changes.
    private let address = UnsafeMutablePointer<sem_t>.allocate(capacity: 1)

    init() { sem_init(address, 0, 0) }

    deinit {
        sem_destroy(address)
        address.deallocate()
    }

    func post() { sem_post(address) }

    func wait() {
        while sem_wait(address) != 0 && errno == EINTR {}
    }
}
