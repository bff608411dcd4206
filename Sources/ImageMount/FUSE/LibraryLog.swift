internal import CFuse3
internal import Glibc
internal import Logging
internal import Synchronization

/// What libfuse has to say, which would otherwise go to standard error as it comes.
///
/// Its log function knows no context, so this is the one thing of the library that belongs to the
/// whole process.
enum LibraryLog {
    private struct State: Sendable {
        var lines: [String] = []
        /// Where lines go once the mount is served; before that they explain a failure.
        var logger: Logger?
    }

    private static let state = Mutex(State())

    /// Takes libfuse's messages from now on.
    static func capture() {
        fuse_set_log_func { _, format, arguments in
            guard let format, let arguments else { return }
            LibraryLog.take(format, arguments)
        }
    }

    /// Passes messages on to `logger` from now on.
    static func pass(to logger: Logger) {
        state.withLock {
            $0.logger = logger
            $0.lines = []
        }
    }

    /// The last message, once.
    static func taken() -> String? {
        state.withLock { state in
            defer { state.lines = [] }
            return state.lines.last
        }
    }

    /// Runs `body` and returns with its result what libfuse and its helper fusermount3 said.
    static func listening(_ body: () -> Int32) -> (status: Int32, said: String?) {
        // fusermount3 is another process: it writes to the standard error that it inherits.
        let room = memfd_create("said", UInt32(MFD_CLOEXEC))
        let saved = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3)
        if room >= 0, saved >= 0 { dup2(room, STDERR_FILENO) }
        let status = body()
        if saved >= 0 {
            dup2(saved, STDERR_FILENO)
            close(saved)
        }
        let helper = room >= 0 ? contents(of: room) : nil
        if room >= 0 { close(room) }
        let library = taken()
        return (status, status == 0 ? nil : helper ?? library)
    }

    private static func contents(of descriptor: Int32) -> String? {
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = pread(descriptor, &bytes, bytes.count, 0)
        guard count > 0 else { return nil }
        return tidy(String(decoding: bytes[..<count], as: UTF8.self))
    }

    private static func take(_ format: UnsafePointer<CChar>, _ arguments: CVaListPointer) {
        var bytes = [CChar](repeating: 0, count: 1024)
        vsnprintf(&bytes, bytes.count, format, arguments)
        let text = String(
            decoding: bytes.prefix { $0 != 0 }.map(UInt8.init(bitPattern:)), as: UTF8.self)
        guard let line = tidy(text) else { return }
        let logger = state.withLock { state in
            if state.logger == nil { state.lines.append(line) }
            return state.logger
        }
        logger?.warning("libfuse: \(line)")
    }

    /// One line without the speaker's name; nil where nothing is left.
    private static func tidy(_ text: String) -> String? {
        guard var line = text.split(whereSeparator: \.isNewline).last else { return nil }
        for speaker in ["fusermount3: ", "fuse: "] where line.hasPrefix(speaker) {
            line = line.dropFirst(speaker.count)
        }
        return line.isEmpty ? nil : String(line)
    }
}
