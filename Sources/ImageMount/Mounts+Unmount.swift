internal import Glibc
internal import QCOW2

extension Mounts {
    /// Unmounts, and returns when the images are written, closed and unlocked and the daemon has
    /// gone: another program may open them the next moment.
    ///
    /// - Parameter timeout: Seconds to wait for the daemon; nil waits for ever.
    /// - Throws: where it is not mounted or busy, and where the images could not be written.
    public static func unmount(_ mountpoint: String, timeout: Double? = nil) throws(MountError) {
        let entry = try entry(at: mountpoint)
        if let owner = entry.userID, geteuid() != 0, owner != geteuid() {
            throw MountError(
                entry.mountpoint,
                "mounted by another user (id \(owner)): that user or root can unmount it")
        }
        guard let client = ControlClient(entry) else {
            return try unmountWithoutDaemon(entry, timeout: timeout)
        }
        guard !client.isUnheard else {
            throw MountError(
                entry.mountpoint,
                "its daemon does not answer, and others wait for it already: let it go on"
                    + " (kill -CONT), or end it (kill -9), then unmount again")
        }
        guard let daemon = ProcessWatch(client.process) else {
            return try unmountWithoutDaemon(entry, timeout: timeout)
        }
        let patience = timeout.map { Int(min(max($0, 1), 10)) } ?? 10
        guard client.beginWaiting(seconds: patience) else {
            // It has ended, or is about to: a killed one loses its socket a moment before it is
            // gone. Or it is stopped: then whoever touches the mount would wait with it.
            if daemon.waitForEnd(milliseconds: 1000) {
                return try unmountWithoutDaemon(entry, timeout: timeout)
            }
            throw MountError(
                entry.mountpoint,
                "its daemon (pid \(client.process)) does not answer: let it go on (kill -CONT), or"
                    + " end it (kill -9), then unmount again")
        }
        try takeAway(entry)
        if let other = MountTable.entries().first(where: { $0.device == entry.device }) {
            throw MountError(
                entry.mountpoint, "unmounted, but the same mount is at \(other.mountpoint)")
        }
        let limit = timeout.map { Int32(clamping: Int(($0 * 1000).rounded(.up))) } ?? -1
        guard daemon.waitForEnd(milliseconds: limit) else {
            throw MountError(
                entry.mountpoint,
                "unmounted, but its daemon (pid \(client.process)) is still"
                    + " writing and closing \(entry.source)")
        }
        try judge(client.lastWord(), entry)
    }

    /// Unmounts, or says who keeps the mount busy.
    private static func takeAway(_ entry: MountEntry) throws(MountError) {
        do throws(SystemError) {
            try unmountPatiently(entry.mountpoint)
        } catch {
            guard error.code == EBUSY else { throw MountError(entry.mountpoint, error) }
            let users = BusyMount.users(of: entry.mountpoint)
            throw MountError(
                entry.mountpoint, users.map { "busy: used by \($0)" } ?? "busy: somebody uses it")
        }
    }

    /// Tries for a third of a second: a loop device that was detached, or a program that was ended,
    /// lets go a moment later.
    private static func unmountPatiently(_ mountpoint: String) throws(SystemError) {
        for _ in 0..<10 {
            do throws(SystemError) {
                return try Unmounter.unmount(mountpoint)
            } catch {
                guard error.code == EBUSY else { throw error }
                usleep(30_000)
            }
        }
        try Unmounter.unmount(mountpoint)
    }

    private static func judge(_ lastWord: String?, _ entry: MountEntry) throws(MountError) {
        guard let lastWord else {
            throw MountError(
                entry.mountpoint, "unmounted, but its daemon ended without closing \(entry.source)")
        }
        let failure = "failed "
        if lastWord.hasPrefix(failure) {
            throw MountError(entry.mountpoint, String(lastWord.dropFirst(failure.count)))
        }
    }

    /// Cleans up after a killed daemon, or takes leave of one that cannot be asked.
    private static func unmountWithoutDaemon(
        _ entry: MountEntry, timeout: Double?
    ) throws(MountError) {
        guard isDead(entry.mountpoint) else {
            try takeAway(entry)
            return try ClosingDaemon.waitForEnd(of: entry, timeout: timeout)
        }
        do throws(SystemError) {
            try Unmounter.unmount(entry.mountpoint, lazily: true)
            try sync(entry.source)
        } catch {
            throw MountError(entry.mountpoint, error)
        }
    }

    /// Brings what the killed daemon wrote to stable storage.
    private static func sync(_ source: String) throws(SystemError) {
        let paths =
            access(source, F_OK) == 0 ? [source] : source.split(separator: ":").map(String.init)
        for path in paths {
            let descriptor = open(path, O_RDONLY | O_CLOEXEC)
            guard descriptor >= 0 else { continue }
            defer { close(descriptor) }
            guard fdatasync(descriptor) == 0 else { throw .last }
        }
    }
}
