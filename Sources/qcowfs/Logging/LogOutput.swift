internal import Glibc
internal import Logging
internal import QCOW2
internal import Synchronization

/// Where the lines of the log go: a file, standard error, or the system's log.
///
/// Until the mount stands, lines for standard error are kept back: a mount that fails says one line
/// and no more.
final class LogOutput: Sendable {
    private enum Target: Sendable {
        case descriptor(Int32)
        case standardError
        case system
    }

    private let target: Target
    /// Lines that wait for the mount; nil when nothing is kept back any more.
    private let waiting: Mutex<[String]?>

    init(file: String?, isForeground: Bool) throws {
        if let file {
            let descriptor = open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
            guard descriptor >= 0 else { throw Failure(file, .last) }
            target = .descriptor(descriptor)
            waiting = Mutex(nil)
        } else {
            target = isForeground ? .standardError : .system
            waiting = Mutex(isForeground ? [] : nil)
            if !isForeground { openlog("qcowfs", LOG_PID, Int32(LOG_DAEMON)) }
        }
    }

    /// Writes what was kept back; lines go out at once from now on.
    func release() {
        let lines = waiting.withLock { lines in
            defer { lines = nil }
            return lines ?? []
        }
        for line in lines { Failure.writeToStandardError(line) }
    }

    func write(_ level: Logger.Level, _ message: String) {
        let line = Failure.oneLine(message)
        switch target {
        case .system: Self.writeToSystemLog(level, line)
        case .descriptor(let descriptor):
            Self.write("\(Self.now) [\(getpid())] \(level): \(line)\n", to: descriptor)
        case .standardError:
            let text = "qcowfs: \(line)\n"
            let isKept = waiting.withLock { lines in
                lines?.append(text)
                return lines != nil
            }
            if !isKept { Failure.writeToStandardError(text) }
        }
    }

    private static func write(_ text: String, to descriptor: Int32) {
        var text = text
        text.withUTF8 { _ = Glibc.write(descriptor, $0.baseAddress, $0.count) }
    }

    private static func writeToSystemLog(_ level: Logger.Level, _ line: String) {
        let priority =
            switch level {
            case .trace, .debug: LOG_DEBUG
            case .info: LOG_INFO
            case .notice: LOG_NOTICE
            case .warning: LOG_WARNING
            case .error: LOG_ERR
            case .critical: LOG_CRIT
            }
        line.withCString { text in
            withVaList([text]) { vsyslog(Int32(priority), "%s", $0) }
        }
    }

    /// The time as `2026-11-22T16:39:04Z`.
    private static var now: String {
        var seconds = time(nil)
        var parts = tm()
        gmtime_r(&seconds, &parts)
        var bytes = [CChar](repeating: 0, count: 32)
        let count = strftime(&bytes, bytes.count, "%Y-%m-%dT%H:%M:%SZ", &parts)
        return String(decoding: bytes[..<count].map(UInt8.init(bitPattern:)), as: UTF8.self)
    }
}

/// Hands the lines of a `Logger` to one output.
struct LineHandler: LogHandler {
    private let output: LogOutput
    var logLevel: Logger.Level
    var metadata: Logger.Metadata = [:]

    init(_ output: LogOutput, level: Logger.Level) {
        self.output = output
        logLevel = level
    }

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        output.write(event.level, event.message.description)
    }
}
