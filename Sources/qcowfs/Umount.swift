internal import ArgumentParser
internal import ImageMount

/// `qcowfs umount`: ends mounts, and returns when the images are free.
struct Umount: Verb {
    static let configuration = CommandConfiguration(
        commandName: "umount",
        abstract: "Unmount, and return when the image is written, closed and unlocked.",
        discussion: "The dead mount of a killed daemon is cleaned up, too.")

    @Option(
        help: ArgumentHelp("Give up waiting for the daemon after this time.", valueName: "seconds"))
    var timeout: Double?

    @Flag(name: [.short, .long], help: "Unmount everything that this user has mounted.")
    var all = false

    @Argument(
        help: ArgumentHelp("Where the images are mounted.", valueName: "mountpoint"),
        completion: .directory)
    var mountpoints: [String] = []

    func validate() throws {
        guard all != !mountpoints.isEmpty else {
            throw ValidationError("mountpoints are needed, or --all alone")
        }
        guard timeout.map({ $0 >= 0 && $0 <= 1e6 }) ?? true else {
            throw ValidationError("--timeout is a number of seconds")
        }
    }

    func perform() throws -> Int32 {
        // The newest first: one may lie on another.
        let wanted = all ? Mounts.list().map(\.mountpoint).reversed() : mountpoints
        var troubles: [MountError] = []
        for mountpoint in wanted {
            do throws(MountError) {
                try Mounts.unmount(mountpoint, timeout: timeout)
            } catch {
                troubles.append(error)
            }
        }
        guard troubles.isEmpty else {
            throw Failure("", troubles.map(\.description).joined(separator: "; "))
        }
        return 0
    }
}
