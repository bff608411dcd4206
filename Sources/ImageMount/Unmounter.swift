internal import Glibc
internal import QCOW2

/// Takes a mount out of the file tree, as root or through fusermount3.
enum Unmounter {
    /// Unmounts what is at an absolute path.
    ///
    /// - Parameter lazily: although it is busy; its users keep what they have.
    static func unmount(_ mountpoint: String, lazily: Bool = false) throws(SystemError) {
        if geteuid() == 0 {
            let flags = Int32(UMOUNT_NOFOLLOW) | (lazily ? Int32(MNT_DETACH) : 0)
            guard umount2(mountpoint, flags) == 0 else { throw .last }
            return
        }
        guard let helper = Requirements.helper else { throw SystemError(code: EPERM) }
        let status = run([helper, "-u"] + (lazily ? ["-z"] : []) + ["--", mountpoint])
        // fusermount3 says no more than that it failed; being busy is the common reason.
        guard status == 0 else { throw SystemError(code: EBUSY) }
    }

    /// Runs a program without its words and returns its exit status, -1 where it did not run.
    private static func run(_ words: [String]) -> Int32 {
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        for stream in [STDOUT_FILENO, STDERR_FILENO] {
            posix_spawn_file_actions_addopen(&actions, stream, "/dev/null", O_WRONLY, 0)
        }
        var arguments: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
        defer { arguments.forEach { free($0) } }
        var process = pid_t()
        guard posix_spawn(&process, words[0], &actions, nil, &arguments, environ) == 0 else {
            return -1
        }
        var status: Int32 = 0
        while waitpid(process, &status, 0) < 0 {
            guard errno == EINTR else { return -1 }
        }
        return status & 0x7f == 0 ? (status >> 8) & 0xff : -1
    }
}
