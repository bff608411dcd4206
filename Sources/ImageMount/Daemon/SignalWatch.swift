internal import Glibc
internal import Logging
internal import QCOW2
internal import Synchronization

/// Ends the mount when the process is told to end.
///
/// libfuse's own handlers would end the loop with pages still dirty in the kernel.  Here the
/// signals are blocked everywhere, and one thread takes them.
final class SignalWatch: Sendable {
    private let daemon: Daemon

    init(_ daemon: Daemon) { self.daemon = daemon }

    private static let ending = [SIGTERM, SIGINT, SIGHUP]

    private static var watched: sigset_t {
        var signals = sigset_t()
        sigemptyset(&signals)
        for signal in ending { sigaddset(&signals, signal) }
        return signals
    }

    /// In the caller, which only waits for the daemon: signals end it as they end any process, as
    /// long as there is nothing to read at `descriptor`, and no longer.
    static func waitUntilReadable(_ descriptor: Int32) {
        var signals = sigset_t()
        pthread_sigmask(SIG_BLOCK, nil, &signals)
        for signal in ending { sigdelset(&signals, signal) }
        var question = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        while ppoll(&question, 1, nil, &signals) < 0 && errno == EINTR {}
    }

    /// Blocks the signals in this thread and in every thread that it will start.
    static func block() {
        var signals = watched
        pthread_sigmask(SIG_BLOCK, &signals, nil)
        // A client of the control socket may go while it is written to.
        signal(SIGPIPE, SIG_IGN)
    }

    func start() throws(MountError) {
        try startThread("signals") { self.work() }
    }

    private func work() {
        _ = next(within: nil)
        daemon.commit()
        var hasLeft = daemon.leave(lazily: false)
        if !hasLeft { tellWhoIsBusy() }
        // Not every end of a user comes to our ears (a working directory's does not): ask again.
        while next(within: hasLeft ? nil : 1) == nil {
            hasLeft = daemon.leave(lazily: false)
        }
        daemon.commit()
        if !hasLeft { _ = daemon.leave(lazily: true) }
        endAnyway()
    }

    /// The next signal, nil when `seconds` have passed without one.
    private func next(within seconds: Int?) -> Int32? {
        var signals = Self.watched
        while true {
            var signal: Int32 = 0
            if let seconds {
                var time = timespec(tv_sec: seconds, tv_nsec: 0)
                signal = sigtimedwait(&signals, nil, &time)
            } else {
                signal = sigwaitinfo(&signals, nil)
            }
            if signal > 0 { return signal }
            if errno == EAGAIN { return nil }
        }
    }

    private func tellWhoIsBusy() {
        let users = BusyMount.users(of: daemon.mountpoint) ?? "somebody"
        daemon.options.logger.warning(
            """
            \(daemon.mountpoint): everything is written; busy with \(users): served until the last \
            close, or until a second signal
            """)
    }

    /// Ends the process although clients still have files open: their descriptors are dead then.
    private func endAnyway() {
        // Where nobody uses the mount, the loop ends now and with it the process.
        usleep(300_000)
        guard daemon.claimEnd() else { return }
        daemon.counters.pointer.pointee.isEnding.store(true, ordering: .sequentiallyConsistent)
        usleep(20_000)
        let trouble = daemon.closeImages()
        if let trouble { daemon.options.logger.error("\(trouble)") }
        if let pidFile = daemon.options.pidFile { unlink(pidFile) }
        _exit(trouble == nil ? 0 : 1)
    }
}

extension Daemon {
    /// Brings everything to stable storage, what the kernel still holds included.
    func commit() {
        ownAccess.flushAll()
        for node in catalogue.allNodes {
            _ = node.pointer.pointee.withOpenImage { image in
                do throws(SystemError) { try image.pointee.flush() } catch {}
            }
        }
    }

    /// Whether our mount is the one on top at the mountpoint: what is not ours is left alone.
    var isMounted: Bool {
        guard let entry = MountTable.entry(at: mountpoint), entry.isOurs else { return false }
        return device.withLock { $0 == nil || $0 == entry.device }
    }

    /// Unmounts; false where somebody keeps the mount busy.
    func leave(lazily: Bool) -> Bool {
        // Somebody else has unmounted it, or hidden it below another mount.
        guard isMounted else { return !MountTable.entries().contains { isOurs($0) } }
        do throws(SystemError) {
            try Unmounter.unmount(mountpoint, lazily: lazily)
            return true
        } catch {
            return error.code == EINVAL || error.code == ENOENT
        }
    }

    private func isOurs(_ entry: MountEntry) -> Bool {
        entry.isOurs && device.withLock { $0 == entry.device }
    }
}
