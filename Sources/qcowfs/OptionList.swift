internal import ArgumentParser
internal import QCOW2

/// The lists of `-o`: `name=value,name=value`; `,,` is a comma in a value, a name alone is `on`.
enum OptionList {
    static func pairs(_ list: String) -> [(name: String, value: String)] {
        var items: [String] = [""]
        var rest = list[...]
        while let character = rest.popFirst() {
            if character != "," {
                items[items.count - 1].append(character)
            } else if rest.first == "," {
                rest.removeFirst()
                items[items.count - 1].append(",")
            } else {
                items.append("")
            }
        }
        return items.filter { !$0.isEmpty }.map { item in
            guard let equals = item.firstIndex(of: "=") else { return (item, "on") }
            return (String(item[..<equals]), String(item[item.index(after: equals)...]))
        }
    }
}

/// A verb that takes options of an image with `-o`.
protocol ImageOptionReader {
    /// What messages name.
    var image: String { get }
}

extension ImageOptionReader {
    func bytes(_ value: String, of name: String) throws -> UInt64 {
        guard let size = ByteSize(argument: value) else {
            throw refused(value, of: name, "a number such as 512, 64k or 2M")
        }
        return size.byteCount
    }

    func isOn(_ value: String, of name: String) throws -> Bool {
        try choice(
            value, of: name,
            [
                "on": true, "off": false, "yes": true, "no": false, "true": true, "false": false,
                "y": true, "n": false,
            ])
    }

    func version(_ value: String, of name: String) throws -> CreateOptions.Version {
        try choice(value, of: name, ["0.10": .v2, "v2": .v2, "1.1": .v3, "v3": .v3])
    }

    func choice<Value>(
        _ value: String, of name: String, _ choices: KeyValuePairs<String, Value>
    ) throws -> Value {
        guard let chosen = choices.first(where: { $0.key == value }) else {
            throw refused(value, of: name, choices.map(\.key).joined(separator: ", "))
        }
        return chosen.value
    }

    func refused(_ value: String, of name: String, _ allowed: String) -> Failure {
        Failure(image, "\(name) cannot be '\(value)' (allowed: \(allowed))")
    }
}
