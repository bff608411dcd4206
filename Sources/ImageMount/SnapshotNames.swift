package import QCOW2

/// What the snapshots of a disk are called beside it.
package enum SnapshotNames {
    /// `NAME@SNAPSHOT.raw` for each snapshot of the disk that is called `NAME.raw`.
    ///
    /// Names that collide with each other or are in `taken`, cannot be, or are too long give way to
    /// the snapshots' identifiers.
    package static func names(
        of snapshots: [Snapshot], beside disk: String, taken: Set<String> = []
    ) -> [String: Snapshot] {
        let stem = disk.hasSuffix(".raw") ? String(disk.dropLast(4)) : disk
        let named = snapshots.map { name(stem, $0.nameBytes) }
        let numbered = snapshots.map { name(stem, $0.idBytes) }
        var usesID = snapshots.map { _ in false }
        // Each round moves at least one more name out of the way of others.
        while true {
            let names = snapshots.indices.map { usesID[$0] ? numbered[$0] : named[$0] }
            var counts: [String: Int] = [:]
            for case let name? in names { counts[name, default: 0] += 1 }
            var isSettled = true
            for index in snapshots.indices where !usesID[index] {
                if let name = names[index], counts[name] == 1, !taken.contains(name) { continue }
                usesID[index] = true
                isSettled = false
            }
            guard !isSettled else {
                let pairs = zip(names, snapshots).compactMap { name, snapshot in
                    name.map { ($0, snapshot) }
                }
                return Dictionary(pairs, uniquingKeysWith: { first, _ in first })
                    .filter { !taken.contains($0.key) }
            }
        }
    }

    /// Nil for what cannot be the name of a file.
    private static func name(_ stem: String, _ word: [UInt8]) -> String? {
        guard !word.isEmpty else { return nil }
        let name = stem + "@" + encoded(word) + ".raw"
        return ExposedName.isPossible(name) ? name : nil
    }

    /// `word` with `/`, control characters, a leading dot and what is no UTF-8 percent-encoded.
    private static func encoded(_ word: [UInt8]) -> String {
        var text = ""
        var rest = word[...]
        if rest.first == UInt8(ascii: ".") { percent(rest.removeFirst(), &text) }
        while !rest.isEmpty {
            var decoder = UTF8()
            var bytes = rest.makeIterator()
            switch decoder.decode(&bytes) {
            case .scalarValue(let scalar):
                let count = UTF8.width(scalar)
                if scalar == "/" || scalar.properties.generalCategory == .control {
                    for byte in rest.prefix(count) { percent(byte, &text) }
                } else {
                    text.unicodeScalars.append(scalar)
                }
                rest = rest.dropFirst(count)
            case .error, .emptyInput: percent(rest.removeFirst(), &text)
            }
        }
        return text
    }

    private static func percent(_ byte: UInt8, _ text: inout String) {
        text += (byte < 16 ? "%0" : "%") + String(byte, radix: 16, uppercase: true)
    }
}
