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

    @Argument(help: ArgumentHelp("Images, and where to mount them.", valueName: "image... mountpoint"))
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
        try refuseWhatIsNotBuilt()
        let log = try LogOutput(file: flags.logFile, isForeground: flags.foreground)
        let level = Logger.Level(rawValue: flags.logLevel) ?? .notice
        let logger = Logger(label: "qcowfs") { _ in LineHandler(log, level: level) }
        let request = MountRequest(
            images: Array(paths.dropLast()), mountpoint: paths[paths.count - 1],
            options: try flags.options(logger: logger))
        return try Mounting.mount(request) { files in
            log.release()
            if let file = files.first, files.count == 1, isatty(STDOUT_FILENO) == 1 {
                print(Self.hint(file))
            }
        }
    }

    /// What to do next, in one line.
    private static func hint(_ path: String) -> String {
        let name = path.split(separator: "/").last ?? ""
        return "\(name) is ready: losetup -fP --show \(path)"
    }

    private func refuseWhatIsNotBuilt() throws {
        if flags.snapshots {
            throw ImageError(.unsupported(.snapshotAccess), file: "--snapshots")
        }
        if let file = flags.passphraseFile {
            throw ImageError(.unsupported(.encryption(method: 2)), file: "--passphrase-file \(file)")
        }
    }
}
