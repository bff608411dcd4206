internal import Glibc
internal import Logging
internal import QCOW2

/// What is to be mounted where.
public struct MountRequest: Sendable {
    /// Image files, or one directory of them.
    public var images: [String]
    /// An existing directory, or an existing regular file for one image.
    public var mountpoint: String
    public var options: MountOptions

    public init(images: [String], mountpoint: String, options: MountOptions) {
        self.images = images
        self.mountpoint = mountpoint
        self.options = options
    }
}

/// Makes a mount and serves it.
public enum Mounting {
    /// Mounts, and serves the mount: in the foreground (`MountOptions.staysInForeground`) until it
    /// has ended, when the exit status is returned.
    ///
    /// In the background nothing returns but an error.  This process splits in two, so no thread
    /// may have been started before: the new one serves the mount, and this one ends with status 0
    /// as soon as the files can be read, after `whenReady`.
    ///
    /// - Parameter whenReady: called with the paths of the raw files when they can be read.
    public static func mount(
        _ request: MountRequest, whenReady: @escaping @Sendable ([String]) -> Void
    ) throws(MountError) -> Int32 {
        let inherited = Background.inheritedDescriptors()
        let mountpoint = try Mountpoint(request.mountpoint)
        var request = request
        try makeAbsolute(&request.options)
        let options = request.options
        let catalogue = try Catalogue.make(request, at: mountpoint)
        // Only a directory's images are opened later.
        if !catalogue.changesByItself { options.passphrases.wipe() }
        let daemon = Daemon(catalogue: catalogue, mountpoint: mountpoint.path, options: options)
        let context = MountContext(
            catalogue: catalogue, options: options, scratch: try Scratch.Key(),
            ownAccess: daemon.ownAccess, counters: daemon.counters)
        let session = try Session(context, options: options)
        SignalWatch.block()
        try session.mount(at: mountpoint.path, options: options)
        if options.staysInForeground {
            return try serveHere(daemon, session, whenReady)
        }
        return try serveInBackground(daemon, session, inherited, whenReady)
    }

    private static func serveHere(
        _ daemon: Daemon, _ session: borrowing Session,
        _ whenReady: @escaping @Sendable ([String]) -> Void
    ) throws(MountError) -> Int32 {
        let failure = FirstError()
        LibraryLog.pass(to: daemon.options.logger)
        let status = daemon.serve(session) { error in
            if let error { failure.keep(error) } else { whenReady(daemon.rawFiles) }
            return true
        }
        if let error = failure.error { throw error }
        return status
    }

    private static func serveInBackground(
        _ daemon: Daemon, _ session: borrowing Session, _ inherited: [Int32],
        _ whenReady: @escaping @Sendable ([String]) -> Void
    ) throws(MountError) -> Int32 {
        let channel = try ReadinessChannel()
        let process = Background.fork()
        guard process >= 0 else {
            let error = SystemError.last
            session.giveUp()
            throw MountError("", "the daemon cannot be started: \(error)")
        }
        if process > 0 {
            try channel.wait(for: process)
            whenReady(daemon.rawFiles)
            // What was opened belongs to the daemon now.
            fflush(nil)
            _exit(0)
        }
        channel.keepDaemonEnd()
        Background.letGo(of: inherited)
        LibraryLog.pass(to: daemon.options.logger)
        _exit(daemon.serve(session) { channel.report($0) })
    }

    /// Frees the paths in `options` from the working directory, which the daemon leaves.
    private static func makeAbsolute(_ options: inout MountOptions) throws(MountError) {
        for index in options.policy.allowedDirectories.indices {
            let directory = options.policy.allowedDirectories[index]
            do throws(SystemError) {
                options.policy.allowedDirectories[index] = try Paths.resolved(directory)
            } catch {
                throw MountError(directory, error)
            }
        }
        guard let pidFile = options.pidFile else { return }
        do throws(SystemError) {
            options.pidFile = try Paths.resolvedExceptLast(pidFile)
        } catch {
            throw MountError(pidFile, error)
        }
    }
}

extension Daemon {
    /// The paths of the raw files; none for a mirrored directory, whose files come and go.
    fileprivate var rawFiles: [String] {
        if catalogue.isMirror { return [] }
        return catalogue.disks.map { ownAccess.path(of: $0.pointer) }.sorted()
    }
}
