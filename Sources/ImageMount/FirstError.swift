internal import Synchronization

/// The first error of several threads.
final class FirstError: Sendable {
    private let kept = Mutex<MountError?>(nil)

    var error: MountError? { kept.withLock { $0 } }

    func keep(_ error: MountError) {
        kept.withLock { if $0 == nil { $0 = error } }
    }
}
