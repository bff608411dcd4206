internal import ArgumentParser
internal import ImageMount
internal import Logging
internal import QCOW2

/// The options of `mount`; each long one is an `-o` option too.
struct MountFlags: ParsableArguments {
    @Flag(name: [.short, .long], help: "Mount read-only.")
    var readOnly = false

    @Option(help: ArgumentHelp("Call the raw file NAME.raw.", valueName: "name"))
    var name: String?

    @Flag(name: [.short, .long], help: "Stay in the foreground.")
    var foreground = false

    @Flag(help: .hidden)
    var fake = false

    @Flag(help: .hidden)
    var remount = false

    @Option(
        name: .customShort("o"), parsing: .unconditionalSingleValue,
        help: ArgumentHelp(
            "Options as mount(8) has them: ro, allow_other, uid=, and every long option here.",
            valueName: "option,..."))
    var mountOptions: [String] = []

    @Option(help: ArgumentHelp("Owner of the files.", valueName: "id"))
    var uid: UInt32?

    @Option(help: ArgumentHelp("Group of the files.", valueName: "id"))
    var gid: UInt32?

    @Option(help: ArgumentHelp("Permission bits the files do not have, octal.", valueName: "mask"))
    var umask: String?

    @Flag(help: "Let every user use the files, as their permissions allow.")
    var allowOther = false

    @Flag(help: "Let root use the files.")
    var allowRoot = false

    @Option(
        help: ArgumentHelp(
            "Send writes to a new overlay: a file that stays, or tmp for one that is dropped; over "
                + "an encrypted image it is encrypted with the (first) passphrase too.",
            valueName: "file|tmp"), completion: .file())
    var overlay: String?

    @Flag(help: "Let truncate make the image smaller.")
    var shrink = false

    @Option(
        help: ArgumentHelp("What a discard does: unmap or ignore.", valueName: "mode"),
        completion: .list(["unmap", "ignore"]))
    var discard = "unmap"

    @Option(
        help: ArgumentHelp("What a write of zeros does: off, on or unmap.", valueName: "mode"),
        completion: .list(["off", "on", "unmap"]))
    var detectZeroes = "off"

    @Option(help: ArgumentHelp("Memory for L2 tables.", valueName: "bytes"))
    var cacheSize: String?

    @Option(help: ArgumentHelp("Metadata is written this often.", valueName: "seconds"))
    var commitInterval: Double = 5

    @Option(help: ArgumentHelp("Worker threads, 2 or more.", valueName: "n"))
    var threads: Int?

    @Flag(help: "Open the image with O_DIRECT.")
    var direct = false

    @Option(
        help: ArgumentHelp(
            "Whether the kernel collects writes before it hands them over.", valueName: "on|off"),
        completion: .list(["on", "off"]))
    var writeback = "off"

    @Option(
        help: ArgumentHelp(
            "Where backing files may lie besides the image's directory.", valueName: "dir"),
        completion: .directory)
    var allowPath: [String] = []

    @Flag(help: "Backing files may lie anywhere.")
    var trustPaths = false

    @Flag(help: "Read-only although another program writes to the image.")
    var forceShare = false

    @Option(
        help: ArgumentHelp("Write the daemon's process id there.", valueName: "file"),
        completion: .file())
    var pidFile: String?

    @Option(
        help: ArgumentHelp(
            "Write the log there instead of to the system's log.", valueName: "file"),
        completion: .file())
    var logFile: String?

    @Option(
        help: ArgumentHelp(
            "The least that is logged: trace, debug, info, notice, warning, error, critical.",
            valueName: "level"),
        completion: .list(["trace", "debug", "info", "notice", "warning", "error", "critical"]))
    var logLevel = "notice"

    @Flag(help: "Show every internal snapshot beside its disk, as NAME@SNAPSHOT.raw.")
    var snapshots = false

    @OptionGroup var passphrases: PassphraseOptions
}

extension MountFlags {
    /// The options in the library's terms; wrong ones are wrong usage.
    func options(logger: Logger) throws -> MountOptions {
        var options = MountOptions(logger: logger)
        options.isReadOnly = readOnly
        options.name = name
        options.staysInForeground = foreground
        options.visibility = allowOther ? .everybody : allowRoot ? .ownerAndRoot : .owner
        (options.owner, options.group) = (uid, gid)
        options.umask = try umask.map(Self.mask)
        options.showsSnapshots = snapshots
        options.overlay = overlay.map { $0 == "tmp" ? .temporary : .file($0) }
        options.rules = try rules()
        options.cacheByteCount = try cacheByteCount(instead: options.cacheByteCount)
        options.commitInterval = try interval()
        options.threadCount = try threads.map(Self.threadCount)
        options.bypassesPageCache = direct
        options.writesBack = try isOn(writeback, "--writeback")
        options.policy = OpenPolicy(allowedDirectories: allowPath, trustsEverything: trustPaths)
        options.forcesShare = forceShare
        options.pidFile = pidFile
        return options
    }

    private func rules() throws -> FileRules {
        var rules = FileRules()
        rules.allowsShrinking = shrink
        guard let discard = FileRules.Discard(rawValue: discard) else {
            throw ValidationError("--discard is unmap or ignore, not '\(self.discard)'")
        }
        guard let detection = FileRules.ZeroDetection(rawValue: detectZeroes) else {
            throw ValidationError("--detect-zeroes is off, on or unmap, not '\(detectZeroes)'")
        }
        rules.discard = discard
        rules.zeroDetection = detection
        return rules
    }

    private func cacheByteCount(instead usual: Int) throws -> Int {
        guard let cacheSize else { return usual }
        guard let size = ByteSize(argument: cacheSize), let count = Int(exactly: size.byteCount),
            count >= 1 << 20, count <= 1 << 36
        else { throw ValidationError("--cache-size is between 1M and 64G, not '\(cacheSize)'") }
        return count
    }

    private func interval() throws -> Duration {
        guard commitInterval >= 0.01, commitInterval <= 86400 else {
            throw ValidationError("--commit-interval is between 0.01 and 86400 seconds")
        }
        return .seconds(commitInterval)
    }

    private func isOn(_ word: String, _ option: String) throws -> Bool {
        guard word == "on" || word == "off" else {
            throw ValidationError("\(option) is on or off, not '\(word)'")
        }
        return word == "on"
    }

    private static func mask(_ text: String) throws -> UInt32 {
        guard let mask = UInt32(text, radix: 8), mask <= 0o777 else {
            throw ValidationError("--umask is an octal number up to 777, not '\(text)'")
        }
        return mask
    }

    private static func threadCount(_ count: Int) throws -> Int {
        guard (2...1024).contains(count) else {
            throw ValidationError("--threads is between 2 and 1024, not \(count)")
        }
        return count
    }
}
