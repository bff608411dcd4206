internal import Glibc
internal import Logging
internal import QCOW2
internal import Synchronization

/// Writes each trouble with an image to the log once, however many requests run into it.
final class TroubleLog: Sendable {
    /// Sentences remembered; an image with more troubles than this repeats itself.
    private static let limit = 1000

    private let logger: Logger
    private let told = Mutex<Set<String>>([])

    init(_ logger: Logger) { self.logger = logger }

    /// Logs `error`, unless it is a client's mistake or was logged before.
    func report(_ error: ImageError) {
        if case .invalidArgument = error.kind { return }
        once("\(error)")
    }

    /// Logs `sentence`, unless it was logged before.
    func once(_ sentence: String) {
        let isNew = told.withLock { told in
            if told.count >= Self.limit { told.removeAll() }
            return told.insert(sentence).inserted
        }
        if isNew { logger.error("\(sentence)") }
    }
}
