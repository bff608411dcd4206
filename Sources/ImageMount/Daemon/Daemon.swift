internal import Glibc
internal import Logging
internal import QCOW2
internal import Synchronization

/// A mount from the moment it exists to the moment its images are closed.
///
/// Everything that a thread needs lies here; the session itself stays with the thread that serves.
final class Daemon: Sendable {
    let catalogue: Catalogue
    /// The absolute path of the mountpoint.
    let mountpoint: String
    let options: MountOptions
    let ownAccess: OwnAccess
    let counters: CountersAddress
    private let since: Int
    /// The number of the mounted file system, once it is known.
    let device = Mutex<String?>(nil)
    /// Work that was asked for over the control socket.
    let jobs = JobGate()
    private let isClaimed = Mutex(false)

    init(catalogue: Catalogue, mountpoint: String, options: MountOptions) {
        self.catalogue = catalogue
        self.mountpoint = mountpoint
        self.options = options
        ownAccess = OwnAccess(catalogue: catalogue, mountpoint: mountpoint)
        counters = CountersAddress()
        since = time(nil)
    }

    /// Serves a mounted session until it is unmounted, closes the images and returns the exit
    /// status.
    ///
    /// - Parameter whenReady: called once, when the files can be read or it is known that they
    ///   cannot; answers whether anybody waits for that.
    func serve(
        _ session: borrowing Session, whenReady: @escaping @Sendable (MountError?) -> Bool
    ) -> Int32 {
        let control = ControlServer(answering: { self.answer($0) })
        let signals = SignalWatch(self)
        do throws(MountError) {
            pthread_setname_np(pthread_self(), "qcowfs")
            try ownAccess.start(for: session.shared, restoresSizes: options.writesBack)
            try startImages()
            try startThread("ready") { self.becomeReady(control, whenReady) }
            try signals.start()
            try session.serve(threadCount: threadCount)
        } catch {
            options.logger.error("\(error)")
            _ = whenReady(error)
            session.giveUp()
        }
        return finish(control, signals)
    }

    /// Few threads are best on few processors; one alone could wait for itself.
    private var threadCount: Int {
        let processors = sysconf(Int32(_SC_NPROCESSORS_ONLN))
        return options.threadCount ?? max(4, min(16, 2 &* max(processors, 1) &+ 2))
    }

    /// Starts what the images do beside the requests.
    private func startImages() throws(MountError) {
        for node in catalogue.disks {
            guard case .image(let opener) = node.pointer.pointee.source else { continue }
            _ = node.pointer.pointee.withOpenImage { opener.startThreads(of: $0.pointee.image) }
        }
    }

    /// Closes every image and tells whoever waits how it went.
    private func finish(_ control: ControlServer, _ signals: SignalWatch) -> Int32 {
        control.stopListening()
        // Otherwise the thread that took the signals closes the images and ends the process.
        while !claimEnd() { pause() }
        ownAccess.finish()
        pthread_setname_np(pthread_self(), ClosingDaemon.processName)
        let trouble = closeImages()
        if let trouble { options.logger.error("\(trouble)") }
        if let pidFile = options.pidFile { unlink(pidFile) }
        control.tellEnd(trouble)
        return trouble == nil ? 0 : 1
    }

    /// Whether the caller is the first who wants to close the images and end the process.
    func claimEnd() -> Bool {
        isClaimed.withLock { isClaimed in
            defer { isClaimed = true }
            return !isClaimed
        }
    }

    /// Writes and closes every image; returns what went wrong.
    func closeImages() -> String? {
        jobs.close()
        let troubles = catalogue.allNodes.compactMap { $0.pointer.pointee.finish() }
        return troubles.isEmpty ? nil : troubles.map(\.description).joined(separator: "; ")
    }

    private func answer(words: [String]) -> [(String, String)]? {
        switch words.first {
        case "holds": answerHolds(words)
        case let verb? where Self.isJob(verb): work(words)
        default: nil
        }
    }

    /// Answers a question that came over the control socket.
    private func answer(_ question: String) -> [(String, String)]? {
        switch question {
        case "about":
            [
                ("pid", "\(getpid())"), ("since", "\(since)"),
                ("image", ControlWords.encoded(catalogue.source.utf8)),
                ("mode", options.isReadOnly || options.forcesShare ? "ro" : "rw"),
            ]
        case "stats": counters.pointer.pointee.lines()
        default: answer(words: ControlWords.words(question) ?? [])
        }
    }
}

/// Where the counters of a mount lie, for as long as the process lives.
struct CountersAddress: @unchecked Sendable {
    // Sendable: what lies there is, and the address never changes.
    let pointer: UnsafeMutablePointer<Counters>

    init() {
        pointer = .allocate(capacity: 1)
        pointer.initialize(to: Counters())
    }
}
