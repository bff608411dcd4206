internal import CFuse3
internal import Glibc

/// What a mount needs of the system, and what to do where it is missing.
enum Requirements {
    private static let containerAdvice =
        "in a container, start it with --device /dev/fuse --cap-add SYS_ADMIN"
        + " --security-opt apparmor=unconfined"

    /// Looks for what is known to be needed, so that the sentence can say what is missing.
    static func check(_ options: MountOptions, mountpoint: String) throws(MountError) {
        guard access("/dev/fuse", F_OK) == 0 else {
            throw MountError(
                mountpoint,
                "there is no /dev/fuse: load the module with modprobe fuse, or, "
                    + containerAdvice)
        }
        guard geteuid() != 0 else { return }
        guard helper != nil else {
            throw MountError(
                mountpoint,
                "fusermount3 is missing, without which only root can mount:"
                    + " install the package fuse3")
        }
        if options.visibility != .owner, !othersMayBeAllowed {
            throw MountError(
                mountpoint,
                "allow_other and allow_root need the line user_allow_other in"
                    + " /etc/fuse.conf, which root must add")
        }
    }

    /// `said`, with the way out where it is known.
    static func explain(_ said: String) -> String {
        if said.contains("/dev/fuse") {
            return geteuid() == 0
                ? "\(said); \(containerAdvice)"
                : "\(said); /dev/fuse must be readable and writable for you (chmod 666 /dev/fuse);"
                    + " \(containerAdvice)"
        }
        if geteuid() == 0, said.hasSuffix("Operation not permitted") {
            return "\(said); \(containerAdvice)"
        }
        return said
    }

    /// The program that mounts and unmounts for users.
    static var helper: String? {
        let path = getenv("PATH").map { String(cString: $0) } ?? ""
        let places =
            path.split(separator: ":").map(String.init) + ["/usr/local/bin", "/usr/bin", "/bin"]
        return places.map { $0 + "/fusermount3" }.first { access($0, X_OK) == 0 }
    }

    private static var othersMayBeAllowed: Bool {
        guard let text = TextFile.contents(of: "/etc/fuse.conf") else { return false }
        return text.split(whereSeparator: \.isNewline).contains { line in
            line.prefix { $0 != "#" }.split(whereSeparator: \.isWhitespace) == ["user_allow_other"]
        }
    }
}
