internal import ArgumentParser

/// The form in which mount(8) and fstab call us: `qcowfs IMAGE MOUNTPOINT -o ro,allow_other`.
///
/// It is rewritten into the verb `mount` before anything is parsed, so that there is one parser.
enum MountHelperForm {
    /// The arguments without the program's name, with the verb in front.
    static func asVerb(_ commandLine: [String]) -> [String] {
        let arguments = Array(commandLine.dropFirst())
        if isMountHelper(commandLine.first ?? "") {
            return mountVerb(fromMountProgram(arguments))
        }
        guard let first = arguments.first else { return arguments }
        if first == "mount" { return mountVerb(Array(arguments.dropFirst())) }
        // A lone unknown word is a mistyped verb; an image comes with its mountpoint.
        let isImage = arguments.count > 1 && !isVerb(first) && isMountOption(first)
        return isImage ? mountVerb(arguments) : arguments
    }

    private static func mountVerb(_ arguments: [String]) -> [String] {
        ["mount"] + MountWords.expanded(arguments)
    }

    /// Whether the first word may begin a mount without its verb: `-o ro IMAGE MOUNTPOINT`.
    private static func isMountOption(_ word: String) -> Bool {
        !word.hasPrefix("-") || word.hasPrefix("-o")
    }

    /// Whether the program was called as `mount.qcowfs` or `mount.fuse.qcowfs`.
    private static func isMountHelper(_ program: String) -> Bool {
        let name = program.split(separator: "/").last ?? ""
        return name == "mount.qcowfs" || name == "mount.fuse.qcowfs"
    }

    private static func isVerb(_ word: String) -> Bool {
        word == "help"
            || Qcowfs.configuration.subcommands.contains {
                $0.configuration.commandName == word || $0.configuration.aliases.contains(word)
            }
    }

    /// Drops what mount(8) says to every helper and means nothing here: `-s`, `-n`, `-v`,
    /// `-t TYPE`, `-N NAMESPACE`.
    private static func fromMountProgram(_ arguments: [String]) -> [String] {
        var kept: [String] = []
        var skipsNext = false
        for argument in arguments {
            if skipsNext {
                skipsNext = false
            } else if argument == "-t" || argument == "-N" {
                skipsNext = true
            } else if argument.hasPrefix("-"), !argument.hasPrefix("--"), !argument.hasPrefix("-o")
            {
                // A cluster such as `-sv`; `-w` and `-r` say what the options say too.
                if argument.contains("r") { kept.append("--read-only") }
                if argument.contains("f") { kept.append("--fake") }
            } else {
                kept.append(argument)
            }
        }
        return kept
    }
}
