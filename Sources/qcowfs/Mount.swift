internal import ArgumentParser
internal import Glibc
internal import ImageMount
internal import Logging
internal import QCOW2

/// `qcowfs mount`: shows images as raw files.
struct Mount: Verb {
    static let configuration = CommandConfiguration(
        commandName: "mount",
        abstract: "Show images as raw disk files.",
        discussion: """
            On a directory every image appears as NAME.raw; on a regular file, that file becomes \
            the disk.  An image may be a directory: every qcow2 file in it appears.
            """)

    @OptionGroup var flags: MountFlags

    @Argument(
        help: ArgumentHelp("Images, and where to mount them.", valueName: "image... mountpoint"),
        completion: .file())
    var paths: [String]

    func validate() throws {
        guard paths.count >= 2 else {
            throw ValidationError("an image and a mountpoint are needed")
        }
        guard Logger.Level(rawValue: flags.logLevel) != nil else {
            throw ValidationError("--log-level: there is no level '\(flags.logLevel)'")
        }
        _ = try flags.options(logger: Logger(label: "", factory: { _ in SwiftLogNoOpLogHandler() }))
    }

    func perform() throws -> Int32 {
        if flags.remount {
            throw Failure(
                paths.last ?? "",
                "the options of a mount cannot be changed: unmount it, and mount it again")
        }
        // What mount(8) does when it does not mount.
        if flags.fake { return 0 }
        let log = try LogOutput(file: flags.logFile, isForeground: flags.foreground)
        let level = Logger.Level(rawValue: flags.logLevel) ?? .notice
        let logger = Logger(label: "qcowfs") { _ in LineHandler(log, level: level) }
        var options = try flags.options(logger: logger)
        options.passphrases = try flags.passphrases.source()
        return try Self.mount(paths, options: options, log)
    }

    /// Mounts where the command line says nothing but files and `--read-only`, and returns the exit
    /// status; nil where it says more.
    ///
    /// Describing thirty options to the argument parser takes longer than the mount itself.
    static func withoutParser(_ arguments: [String]) -> Int32? {
        guard arguments.first == "mount" else { return nil }
        let words = arguments.dropFirst()
        let isReadOnly = words.contains("--read-only") || words.contains("-r")
        let paths = words.filter { $0 != "--read-only" && $0 != "-r" }
        guard paths.count >= 2, !paths.contains(where: { $0.isEmpty || $0.hasPrefix("-") }) else {
            return nil
        }
        do {
            let log = try LogOutput(file: nil, isForeground: false)
            let logger = Logger(label: "qcowfs") { _ in LineHandler(log, level: .notice) }
            var options = MountOptions(logger: logger)
            options.isReadOnly = isReadOnly
            options.passphrases = PassphraseSource(question: PassphraseQuestion.ask)
            return try mount(Array(paths), options: options, log)
        } catch {
            Failure.print("mount: \(error)")
            return 1
        }
    }

    /// Shows the images, all but the last of `paths`, at the last one.
    private static func mount(
        _ paths: [String], options: MountOptions, _ log: LogOutput
    ) throws -> Int32 {
        let request = MountRequest(
            images: Array(paths.dropLast()), mountpoint: paths[paths.count - 1], options: options)
        return try Mounting.mount(request) { files in
            log.release()
            if let file = files.first, files.count == 1, isatty(STDOUT_FILENO) == 1 {
                print(hint(file))
            }
        }
    }

    /// What to do next, in one line.
    private static func hint(_ path: String) -> String {
        let name = path.split(separator: "/").last ?? ""
        return "\(name) is ready: losetup -fP --show \(path)"
    }
}
