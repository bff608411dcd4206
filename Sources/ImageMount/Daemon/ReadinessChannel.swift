internal import Glibc
internal import QCOW2

/// How a daemon tells the process it came from that its files can be read, or why not.
struct ReadinessPipe: Sendable {
    private let reading: Int32
    private let writing: Int32

    /// What stands for success; a sentence never begins so.
    private static let ready: UInt8 = 0

    init() throws(MountError) {
        var ends: [Int32] = [0, 0]
        guard pipe2(&ends, O_CLOEXEC) == 0 else { throw MountError("", .last) }
        reading = ends[0]
        writing = ends[1]
    }

    /// In the daemon: it will only speak.
    func keepWriting() { close(reading) }

    func report(_ error: MountError?) {
        var bytes = error.map { Array("\($0)".utf8.prefix(4000)) } ?? [Self.ready]
        _ = write(writing, &bytes, bytes.count)
        close(writing)
    }

    /// In the caller: waits for the daemon's word, or for its end.
    func wait(for daemon: pid_t) throws(MountError) {
        close(writing)
        var bytes = [UInt8](repeating: 0, count: 4096)
        var count = read(reading, &bytes, bytes.count)
        while count < 0 && errno == EINTR { count = read(reading, &bytes, bytes.count) }
        if count == 1, bytes[0] == Self.ready { return }
        // Whoever asks next shall find the image unlocked and the mountpoint free.
        var status: Int32 = 0
        while waitpid(daemon, &status, 0) < 0 && errno == EINTR {}
        guard count > 0 else {
            throw MountError("", "the daemon ended before its files could be read")
        }
        throw MountError("", String(decoding: bytes[..<count], as: UTF8.self))
    }
}
