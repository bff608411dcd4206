internal import Glibc
internal import QCOW2

/// A question to the daemon behind a mount.
struct ControlClient: ~Copyable {
    private let connection: Int32
    /// The daemon's process id; 0 where it cannot be seen from here.
    let process: pid_t
    /// Whether too many others wait for the daemon's answer.
    let isUnheard: Bool

    /// Connects to the daemon of a mount; nil where there is none (any more).
    ///
    /// Where so many wait for an answer that nobody can join them, there will be none for us:
    /// no process is known, and every question goes unanswered.
    init?(_ entry: MountEntry) {
        var isUnheard = false
        let made = try? ControlSocket.make(entry.device) { descriptor, address, length in
            ControlSocket.limit(descriptor, seconds: 5)
            let status = connect(descriptor, address, length)
            isUnheard = status != 0 && errno == EAGAIN
            return isUnheard ? 0 : status
        }
        guard let connected = made else { return nil }
        if isUnheard {
            self.isUnheard = true
            connection = connected
            process = 0
            return
        }
        // Anybody may take a name: only the user who mounted, or root, is believed.
        guard let peer = ControlSocket.peer(of: connected),
            peer.uid == 0 || peer.uid == entry.userID
        else {
            close(connected)
            return nil
        }
        self.isUnheard = false
        connection = connected
        process = peer.pid
    }

    deinit { close(connection) }

    /// Asks, and returns the answer's lines.
    borrowing func ask(_ question: String) -> [String: String]? {
        ControlSocket.send(question + "\n", to: connection)
        guard let text = readAll() else { return nil }
        let pairs = text.split(separator: "\n").compactMap { line -> (String, String)? in
            guard let sign = line.firstIndex(of: "=") else { return nil }
            return (String(line[..<sign]), String(line[sign...].dropFirst()))
        }
        return pairs.isEmpty ? nil : Dictionary(pairs, uniquingKeysWith: { _, last in last })
    }

    /// Asks for work that takes its time, and returns the answer's lines; nil where the daemon ends
    /// without one.
    borrowing func wait(for question: String) -> [String: String]? {
        ControlSocket.limit(connection, seconds: 0)
        return ask(question)
    }

    private borrowing func readAll() -> String? {
        var bytes: [UInt8] = []
        var part = [UInt8](repeating: 0, count: 4096)
        while bytes.count < 256 << 20 {
            let count = recv(connection, &part, part.count, 0)
            guard count >= 0 else { return nil }
            guard count > 0 else { break }
            bytes += part[..<count]
        }
        return String(decoding: bytes, as: UTF8.self)
    }

    /// Asks to be told of the end; false where the daemon does not answer in `seconds`.
    borrowing func beginWaiting(seconds: Int) -> Bool {
        ControlSocket.limit(connection, seconds: seconds)
        ControlSocket.send("wait\n", to: connection)
        return nextLine() == "waiting"
    }

    /// What the daemon said of its end; nil where it ended without a word.
    borrowing func lastWord() -> String? { nextLine() }

    private borrowing func nextLine() -> String? {
        var line: [UInt8] = []
        var byte: UInt8 = 0
        while line.count < 8192, recv(connection, &byte, 1, 0) == 1 {
            if byte == UInt8(ascii: "\n") { return String(decoding: line, as: UTF8.self) }
            line.append(byte)
        }
        return nil
    }
}
