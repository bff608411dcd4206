internal import Foundation
internal import Synchronization

/// Runs `body` once on each of `count` threads of its own and returns when all have ended.
///
/// The first error that one of them throws is thrown here, after the others have ended.
package func onThreads(
    _ count: Int, _ body: @escaping @Sendable (Int) throws -> Void
) throws {
    let failure = FirstError()
    let threads = (0..<count).map { index in
        let done = DispatchSemaphore(value: 0)
        let thread = Thread {
            do { try body(index) } catch { failure.keep(error) }
            done.signal()
        }
        thread.stackSize = 1 << 20
        thread.start()
        return done
    }
    for done in threads { done.wait() }
    if let error = failure.error { throw error }
}

private final class FirstError: Sendable {
    private let first = Mutex<(any Error)?>(nil)
    var error: (any Error)? { first.withLock { $0 } }
    func keep(_ error: any Error) { first.withLock { $0 = $0 ?? error } }
}
