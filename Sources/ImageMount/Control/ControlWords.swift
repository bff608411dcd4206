/// Words of a question over the control socket: bytes that stand for themselves, or `%` and two
/// digits, so that names may hold anything.
enum ControlWords {
    static func encoded(_ word: some Sequence<UInt8>) -> String {
        var text = ""
        for byte in word {
            let isPlain =
                (0x30...0x39).contains(byte) || (0x41...0x5a).contains(byte)
                || (0x61...0x7a).contains(byte) || byte == UInt8(ascii: ".")
                || byte == UInt8(ascii: ":") || byte == UInt8(ascii: "-")
            if isPlain {
                text.unicodeScalars.append(Unicode.Scalar(byte))
            } else {
                text += (byte < 16 ? "%0" : "%") + String(byte, radix: 16)
            }
        }
        return text.isEmpty ? "%" : text
    }

    static func line(_ words: [String]) -> String {
        words.map { encoded($0.utf8) }.joined(separator: " ")
    }

    /// The bytes of a word; nil for what is none.
    static func decoded(_ word: Substring) -> [UInt8]? {
        if word == "%" { return [] }
        var bytes: [UInt8] = []
        var rest = Array(word.utf8)[...]
        while let byte = rest.popFirst() {
            guard byte == UInt8(ascii: "%") else {
                bytes.append(byte)
                continue
            }
            let digits = String(decoding: rest.prefix(2), as: UTF8.self)
            guard digits.utf8.count == 2, let value = UInt8(digits, radix: 16) else { return nil }
            bytes.append(value)
            rest = rest.dropFirst(2)
        }
        return bytes
    }

    /// The words of a line; nil for a line that nobody of ours has written.
    static func words(_ line: String) -> [String]? {
        var words: [String] = []
        for part in line.split(separator: " ", omittingEmptySubsequences: false) {
            guard let bytes = decoded(part) else { return nil }
            words.append(String(decoding: bytes, as: UTF8.self))
        }
        return words
    }
}
