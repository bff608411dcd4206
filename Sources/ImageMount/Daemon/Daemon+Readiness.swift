internal import Glibc
internal import Logging
internal import QCOW2
internal import Synchronization

extension Daemon {
    /// Does what is to be done from outside the loop before the mount counts as made.
    func becomeReady(_ control: ControlServer, _ report: @Sendable (MountError?) -> Bool) {
        do throws(MountError) {
            if options.writesBack, !options.isReadOnly, let file = catalogue.rootFile {
                // While the kernel writes back it trusts its own size, and a file that is a
                // mountpoint begins with none.
                ownAccess.tellSize(of: file.pointer)
            }
            let device = try verify()
            self.device.withLock { $0 = device }
            tune(device)
            try control.start(device)
            try writePidFile()
            // Who mounted may have been ended meanwhile: then nobody knows of the mount.
            if !report(nil) { abandon() }
        } catch {
            _ = report(error)
            abandon()
        }
    }

    /// Reads from the mount as a client would, and returns the number of the file system.
    private func verify() throws(MountError) -> String {
        let node = catalogue.allNodes.first
        let path = node.map { ownAccess.path(of: $0.pointer) } ?? mountpoint
        let mountpoint = mountpoint
        let found = ownAccess.asOwnThread {
            Swift.Result { () throws(MountError) in
                try Self.device(of: mountpoint, showing: path, isFile: node != nil)
            }
        }
        guard let found else { throw MountError(mountpoint, "no thread can be started") }
        return try found.get()
    }

    /// The number of the file system at `mountpoint`, after a look at a `path` in it.
    private static func device(
        of mountpoint: String, showing path: String, isFile: Bool
    ) throws(MountError) -> String {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW)
        guard descriptor >= 0 || errno == EACCES else { throw MountError(path, .last) }
        defer { if descriptor >= 0 { close(descriptor) } }
        if isFile, descriptor >= 0 {
            var byte: UInt8 = 0
            // A first sector that is damaged is no reason to withhold the others.
            if pread(descriptor, &byte, 1, 0) < 0, errno != EIO { throw MountError(path, .last) }
        }
        var status = stat()
        // With another owner's files we may not read what we show; that it is shown can be seen.
        let isSeen = descriptor >= 0 ? fstat(descriptor, &status) : stat(mountpoint, &status)
        guard isSeen == 0 else { throw MountError(mountpoint, .last) }
        return MountEntry.device(status.st_dev)
    }

    /// Has the kernel read and write in larger parts; only root may, and nothing depends on it.
    private func tune(_ device: String) {
        guard geteuid() == 0 else { return }
        TextFile.set("/sys/class/bdi/\(device)/read_ahead_kb", to: "1024")
        TextFile.set("/sys/class/bdi/\(device)/strict_limit", to: "0")
    }

    private func writePidFile() throws(MountError) {
        guard let path = options.pidFile else { return }
        let descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o644)
        guard descriptor >= 0 else { throw MountError(path, .last) }
        defer { close(descriptor) }
        var text = "\(getpid())\n"
        let isWritten = text.withUTF8 { write(descriptor, $0.baseAddress, $0.count) == $0.count }
        guard isWritten else { throw MountError(path, .last) }
    }

    /// Ends a mount that did not come about.
    private func abandon() {
        guard isMounted else { return }
        do throws(SystemError) {
            try Unmounter.unmount(mountpoint, lazily: true)
        } catch {
            options.logger.error("\(mountpoint): cannot be unmounted: \(error)")
        }
    }
}
