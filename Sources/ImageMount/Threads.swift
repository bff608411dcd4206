internal import Glibc
internal import QCOW2

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
