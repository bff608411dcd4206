internal import Glibc
internal import QCOW2

/// Asks a person for a passphrase, without showing what is typed.
enum PassphraseQuestion {
    /// Nil where standard input is no terminal.
    @Sendable
    static func ask(_ file: String) throws(ImageError) -> Passphrase? {
        try ask(file, again: false)
    }

    static func ask(_ file: String, again: Bool) throws(ImageError) -> Passphrase? {
        var settings = termios()
        guard tcgetattr(STDIN_FILENO, &settings) == 0 else { return nil }
        var silent = settings
        // Keys come one by one and mean what we say: nothing is left silent when one ends it.
        silent.c_lflag &= ~tcflag_t(ECHO | ICANON | ISIG)
        guard tcsetattr(STDIN_FILENO, TCSAFLUSH, &silent) == 0 else { return nil }
        Failure.writeToStandardError(
            "Passphrase for \(Failure.oneLine(file))\(again ? ", again" : ""): ")
        defer {
            tcsetattr(STDIN_FILENO, TCSAFLUSH, &settings)
            Failure.writeToStandardError("\n")
        }
        return try withUnsafeTemporaryAllocation(byteCount: 4096, alignment: 16) {
            line throws(ImageError) in
            defer { if let start = line.baseAddress { explicit_bzero(start, line.count) } }
            guard let count = readLine(into: line) else { throw ImageError(.cancelled, file: file) }
            return Passphrase(UnsafeRawBufferPointer(rebasing: line[..<count]))
        }
    }

    /// How many bytes were typed before Return; nil where the person gave up.
    private static func readLine(into line: UnsafeMutableRawBufferPointer) -> Int? {
        var count = 0
        while true {
            var key: UInt8 = 0
            guard read(STDIN_FILENO, &key, 1) == 1 else { return nil }
            switch key {
            case 0x0a, 0x0d: return count
            case 0x03, 0x04, 0x1a, 0x1c: return nil  // Control with C, D, Z, backslash
            case 0x15: count = 0  // Control-U: from the beginning
            case 0x08, 0x7f: count = withoutLastCharacter(line[..<count])
            default:
                guard count < line.count else { return nil }
                line[count] = key
                count += 1
            }
        }
    }

    /// The length without the last character, which may have several bytes.
    private static func withoutLastCharacter(
        _ bytes: Slice<UnsafeMutableRawBufferPointer>
    ) -> Int {
        bytes.lastIndex { $0 & 0xc0 != 0x80 } ?? 0
    }
}
