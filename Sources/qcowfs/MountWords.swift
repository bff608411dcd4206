internal import ImageMount

/// What stands behind `-o`, rewritten into the long options of `mount`.
enum MountWords {
    /// What mount(8) says to every file system, and what is so here in any case.
    private static let meaningless: Set<String> = [
        "rw", "dev", "nodev", "suid", "nosuid", "exec", "noexec", "auto", "noauto", "user",
        "nouser",
        "users", "owner", "group", "_netdev", "nofail", "defaults", "sync", "async", "atime",
        "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "lazytime",
        "nolazytime", "dirsync", "silent", "loud", "mand", "nomand", "iversion", "noiversion",
        "default_permissions", "helper", "uhelper",
    ]

    /// `arguments` with every `-o` option as a long option of its own.
    static func expanded(_ arguments: [String]) -> [String] {
        var result: [String] = []
        var rest = arguments[...]
        while let argument = rest.popFirst() {
            if argument == "--" { return result + [argument] + rest }
            if argument == "-o", let words = rest.popFirst() {
                result += split(words).compactMap(longOption)
            } else if argument.hasPrefix("-o"), argument.count > 2 {
                result += split(String(argument.dropFirst(2))).compactMap(longOption)
            } else {
                result.append(argument)
            }
        }
        return result
    }

    /// `ro,uid=5,allow-path=/a\,b` in its parts; a backslash takes a comma's meaning away.
    static func split(_ words: String) -> [String] {
        var parts = [""]
        var isQuoted = false
        for character in words {
            if isQuoted {
                parts[parts.count - 1] += character == "," ? "," : "\\\(character)"
                isQuoted = false
            } else if character == "\\" {
                isQuoted = true
            } else if character == "," {
                parts.append("")
            } else {
                parts[parts.count - 1].append(character)
            }
        }
        if isQuoted { parts[parts.count - 1] += "\\" }
        return parts.filter { !$0.isEmpty }
    }

    /// The long option that a word stands for; nil where it says nothing here.
    private static func longOption(_ word: String) -> String? {
        let name = String(word.prefix { $0 != "=" })
        let value = MountTable.unescaped(String(word.dropFirst(name.count)))
        if meaningless.contains(name) || name == "comment" { return nil }
        if name.hasPrefix("x-") || name.hasPrefix("X-") { return nil }
        switch name {
        case "ro": return "--read-only"
        default: return "--" + name.replacing("_", with: "-") + value
        }
    }
}
