internal import CFuse3
internal import Glibc

/// Another process, held so that its end can be waited for whatever its id is used for later.
struct ProcessWatch: ~Copyable {
    private let descriptor: Int32

    /// Nil where there is no such process.
    init?(_ process: pid_t) {
        guard process > 0 else { return nil }
        let descriptor = qcowfs_pidfd_open(process)
        guard descriptor >= 0 else { return nil }
        self.descriptor = descriptor
    }

    deinit { close(descriptor) }

    /// Waits for the end; false where it has not come after `milliseconds` (-1: for ever).
    borrowing func waitForEnd(milliseconds: Int32) -> Bool {
        var question = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        while true {
            let count = poll(&question, 1, milliseconds)
            if count >= 0 { return count > 0 }
            guard errno == EINTR else { return false }
        }
    }
}
