internal import CFuse3
internal import Glibc

/// Going into the background, in one process start and before there is any thread.
enum Background {
    /// Splits the process in two; returns 0 in the new one.
    static func fork() -> pid_t { qcowfs_fork() }

    /// The descriptors that this process was started with, besides the standard three.
    static func inheritedDescriptors() -> [Int32] {
        TextFile.names(in: "/proc/self/fd").compactMap { Int32($0) }.filter { descriptor in
            // Those that were opened since do not survive an exec; one is closed by now.
            let flags = fcntl(descriptor, F_GETFD)
            return descriptor > STDERR_FILENO && flags >= 0 && flags & FD_CLOEXEC == 0
        }
    }

    /// Gives up what belongs to the caller: session, directory, standard streams, descriptors.
    static func letGo(of inherited: [Int32]) {
        setsid()
        _ = chdir("/")
        for descriptor in inherited { close(descriptor) }
        let nothing = open("/dev/null", O_RDWR | O_CLOEXEC)
        for stream in [STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO] {
            if nothing >= 0 { dup2(nothing, stream) } else { close(stream) }
        }
        if nothing > STDERR_FILENO { close(nothing) }
    }
}
