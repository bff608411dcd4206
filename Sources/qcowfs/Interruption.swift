internal import Glibc
internal import Synchronization

/// Ctrl-C and SIGTERM while an image is being written: the work stops between two steps, so that
/// nothing is left half done.
enum Interruption {
    private static let flag = Atomic(false)

    /// From here on the first signal is remembered; a second one ends the program at once.
    static func watch() {
        // Made here, because a signal handler may not.
        flag.store(false, ordering: .relaxed)
        for number in [SIGINT, SIGTERM] {
            var action = sigaction()
            action.__sigaction_handler.sa_handler = { _ in
                Interruption.flag.store(true, ordering: .relaxed)
            }
            action.sa_flags = Int32(bitPattern: UInt32(SA_RESETHAND)) | SA_RESTART
            sigaction(number, &action, nil)
        }
    }

    static var hasCome: Bool { flag.load(ordering: .relaxed) }
}
