internal import Glibc
internal import QCOW2
internal import Synchronization

/// Answers questions about a running mount, and tells those who wait how it ended.
///
/// A question is one line.  What takes its time gets a thread of its own.  `about` and `stats` are
/// answered with lines `key=value`, and so is work on the images; `wait` with one line when the
/// images are closed: `done`, or `failed SENTENCE`.
final class ControlServer: Sendable {
    private let listener = Mutex<Int32>(-1)
    /// Connections of those who wait for the end.
    private let waiting = Mutex<[Int32]>([])
    private let answer: @Sendable (String) -> [(String, String)]?

    init(answering answer: @escaping @Sendable (String) -> [(String, String)]?) {
        self.answer = answer
    }

    /// Listens for the mount with this number, on a thread of its own.
    func start(_ device: String) throws(MountError) {
        let descriptor = try listen(device)
        listener.withLock { $0 = descriptor }
        try startThread("control") { self.work(descriptor) }
    }

    private func listen(_ device: String) throws(MountError) -> Int32 {
        // The number may be that of a mount that has just gone, whose daemon is about to let go.
        var attempt = 0
        while true {
            do throws(SystemError) {
                return try ControlSocket.make(device) { descriptor, address, length in
                    bind(descriptor, address, length) == 0 ? Glibc.listen(descriptor, 16) : -1
                }
            } catch {
                guard error.code == EADDRINUSE, attempt < 1000 else {
                    throw MountError("control socket", error)
                }
                attempt += 1
                usleep(1000)
            }
        }
    }

    private func work(_ listener: Int32) {
        while true {
            let connection = accept4(
                listener, __SOCKADDR_ARG(__sockaddr__: nil), nil, Int32(SOCK_CLOEXEC.rawValue))
            if connection >= 0 {
                serve(connection)
            } else if errno != EINTR && errno != ECONNABORTED {
                return
            }
        }
    }

    private func serve(_ connection: Int32) {
        guard let peer = ControlSocket.peer(of: connection), peer.uid == 0 || peer.uid == geteuid()
        else {
            close(connection)
            return
        }
        ControlSocket.limit(connection, seconds: 2)
        let question = Self.line(from: connection)
        if question == "wait" {
            // In one step with the answer: whoever has it unmounts, and must be told of the end.
            waiting.withLock { waiting in
                ControlSocket.send("waiting\n", to: connection)
                waiting.append(connection)
            }
            return
        }
        guard let question, Daemon.isJob(question) else {
            return reply(to: question ?? "", connection)
        }
        do throws(MountError) {
            try startThread("control-job") { self.reply(to: question, connection) }
        } catch {
            reply(to: question, connection)
        }
    }

    private func reply(to question: String, _ connection: Int32) {
        let lines = answer(question) ?? []
        ControlSocket.send(lines.map { "\($0)=\($1)\n" }.joined(), to: connection)
        close(connection)
    }

    private static func line(from connection: Int32) -> String? {
        var line: [UInt8] = []
        var part = [UInt8](repeating: 0, count: 4096)
        while line.count < 256 << 10 {
            let count = recv(connection, &part, part.count, 0)
            guard count > 0 else { return nil }
            line += part[..<count]
            if line.last == UInt8(ascii: "\n") {
                return String(decoding: line.dropLast(), as: UTF8.self)
            }
        }
        return nil
    }

    /// Takes no more questions: the mount's number may belong to another one from now on.
    func stopListening() {
        listener.withLock { descriptor in
            guard descriptor >= 0 else { return }
            shutdown(descriptor, Int32(SHUT_RDWR))
            close(descriptor)
            descriptor = -1
        }
    }

    /// Tells everybody who waits how the mount ended.
    func tellEnd(_ trouble: String?) {
        let connections = waiting.withLock { $0 }
        for connection in connections {
            ControlSocket.send(trouble.map { "failed \($0)\n" } ?? "done\n", to: connection)
            close(connection)
        }
    }
}
