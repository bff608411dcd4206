internal import Glibc
internal import QCOW2

/// How a daemon tells the process it came from that its files can be read, or why not.
struct ReadinessChannel: Sendable {
    private let callerEnd: Int32
    private let daemonEnd: Int32

    /// What stands for success, and for having heard of it; a sentence never begins so.
    private static let ready: UInt8 = 0

    init() throws(MountError) {
        var ends: [Int32] = [0, 0]
        let type = Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
        guard socketpair(AF_UNIX, type, 0, &ends) == 0 else { throw MountError("", .last) }
        callerEnd = ends[0]
        daemonEnd = ends[1]
    }

    /// In the daemon: the other end is the caller's alone.
    func keepDaemonEnd() { close(callerEnd) }

    /// In the daemon: returns whether the caller has heard that all is well.
    func report(_ error: MountError?) -> Bool {
        defer { close(daemonEnd) }
        let bytes = error.map { Array("\($0)".utf8.prefix(4000)) } ?? [Self.ready]
        guard send(daemonEnd, bytes, bytes.count, Int32(MSG_NOSIGNAL)) == bytes.count else {
            return false
        }
        // A process that is ended by a signal keeps its descriptors for a moment.
        return error == nil && Self.receive(from: daemonEnd) == [Self.ready]
    }

    /// In the caller: waits for the daemon's word, or for its end.
    func wait(for daemon: pid_t) throws(MountError) {
        close(daemonEnd)
        SignalWatch.waitUntilReadable(callerEnd)
        let bytes = Self.receive(from: callerEnd)
        if bytes == [Self.ready] {
            _ = send(callerEnd, bytes, 1, Int32(MSG_NOSIGNAL))
            return
        }
        // Whoever asks next shall find the image unlocked and the mountpoint free.
        var status: Int32 = 0
        while waitpid(daemon, &status, 0) < 0 && errno == EINTR {}
        guard !bytes.isEmpty else {
            throw MountError("", "the daemon ended before its files could be read")
        }
        throw MountError("", String(decoding: bytes, as: UTF8.self))
    }

    /// What comes next; empty where the other process has ended.
    private static func receive(from descriptor: Int32) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 4096)
        var count = recv(descriptor, &bytes, bytes.count, 0)
        while count < 0 && errno == EINTR { count = recv(descriptor, &bytes, bytes.count, 0) }
        return Array(bytes[..<max(count, 0)])
    }
}
