internal import ArgumentParser
internal import Glibc

/// The program: a list of verbs, one file each.
@main
struct Qcowfs: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "qcowfs",
        abstract: "Show qcow2 images as raw disk files.",
        usage: """
            qcowfs VERB ...
            qcowfs IMAGE MOUNTPOINT [-o OPTION,...]
            """,
        version: "0.1.0",
        subcommands: [
            Mount.self, Umount.self, List.self, Stats.self,
            Create.self, Info.self, Check.self, Repair.self, Map.self,
            Convert.self, Compare.self, Measure.self, Commit.self, Rebase.self, Amend.self,
            Resize.self, Snapshots.self, Bitmap.self, Discard.self, Compact.self,
            Read.self, Write.self,
            Audit.self, Explain.self, Dehydrate.self, Rehydrate.self,
            SHA256.self, SHA1.self,
        ])

    static func main() {
        ProgramStart.prepare()
        let arguments = MountHelperForm.asVerb(ProgramStart.arguments)
        Glibc.exit(Mount.withoutParser(arguments) ?? status(of: arguments))
    }

    /// Runs the verb that `arguments` name, prints what is to be said, and returns the exit status.
    private static func status(of arguments: [String]) -> Int32 {
        do {
            var command = try parseAsRoot(arguments)
            try command.run()
            return 0
        } catch {
            return report(error)
        }
    }

    /// Help and versions go to standard output, wrong usage with the usage to standard error.
    private static func report(_ error: any Error) -> Int32 {
        let message = fullMessage(for: error)
        let status = exitCode(for: error).rawValue
        if status == 0 {
            print(message)
        } else if !message.isEmpty {
            let sentence = message.hasPrefix("Error: ") ? message.dropFirst(7) : message[...]
            Failure.writeToStandardError("qcowfs: \(sentence)\n")
        }
        return fflush(nil) == 0 ? status : 1
    }
}
