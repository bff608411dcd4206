internal import CFuse3
internal import Glibc
internal import Logging
internal import QCOW2
internal import Synchronization

/// What this process does to its own mount: it makes the kernel write the dirty pages it holds.
///
/// The kernel asks SEEK_DATA and SEEK_HOLE without writing them first, stores to mappings included;
/// and it drops them when a session ends.  A descriptor on the own file and `sync_file_range` bring
/// them out (an fsync would wait for the inode's lock, which SEEK_DATA holds).  The descriptor is
/// closed at once: a lasting one would keep the mount busy for ever.
///
/// All of this is asked for on a thread of its own, never on a worker: it waits for writes that the
/// workers must take.  And the waiting itself is an `OutsideThread`'s, so that the mount ends
/// with a daemon that is killed meanwhile.
final class OwnAccess: Sendable {
    private let catalogue: Catalogue
    /// The mountpoint as it was resolved before the mount.
    private let mountpoint: String
    private let queue = Mutex(Queue())
    private let wakeUp: Semaphore
    private let sizeWakeUp = Semaphore()
    /// Threads that are opening a file of the mount for flushing, or telling its size.
    private let ownThreads = Mutex<Set<pid_t>>([])
    private let session = Mutex<SessionHandle?>(nil)

    private struct Queue: Sendable {
        var jobs: [Job] = []
        /// Files whose size the kernel is about to be told…
        var waiting: Set<fuse_ino_t> = []
        /// …and the one whose size it is being told.
        var restoring: fuse_ino_t?
        var isWorking = false
        /// The session has ended: nobody waits for an answer any more.
        var isFinished = false
    }

    private enum Job: Sendable {
        case seek(PendingSeek)
        case read(PendingRead)
        case written(PendingWrite)
    }

    init(catalogue: Catalogue, mountpoint: String) {
        self.catalogue = catalogue
        self.mountpoint = mountpoint
        wakeUp = Semaphore()
    }

    /// Starts the thread; once, and not before the daemon has forked.
    ///
    /// - Parameter restoresSizes: the kernel writes back, and may believe in sizes of its own.
    func start(for session: SessionHandle, restoresSizes: Bool) throws(MountError) {
        self.session.withLock { $0 = session }
        try startThread("own-access") { self.work() }
        if restoresSizes { try startThread("sizes") { self.restoreSizes() } }
    }

    private func work() {
        let outside = try? OutsideThread()
        while true {
            wakeUp.wait()
            let job = queue.withLock { queue -> Job? in
                guard !queue.isFinished, !queue.jobs.isEmpty else { return nil }
                queue.isWorking = true
                return queue.jobs.removeFirst()
            }
            switch job {
            case .seek(let pending): answer(pending, outside)
            case .read(let pending): answer(pending, outside)
            case .written(let pending): answer(pending)
            case nil: break
            }
            queue.withLock { $0.isWorking = false }
        }
    }

    /// Takes no more work, and returns when what has begun is done: the images are about to close.
    func finish() {
        queue.withLock { $0.isFinished = true }
        while queue.withLock({ $0.isWorking }) { usleep(500) }
    }

    private func add(_ job: Job) {
        queue.withLock { $0.jobs.append(job) }
        wakeUp.post()
    }
}

// MARK: Flushing

extension OwnAccess {
    /// Whether `thread` is one of ours, asking the kernel something about a file of the mount.
    func isOwn(thread: pid_t) -> Bool {
        ownThreads.withLock { !$0.isEmpty && $0.contains(thread) }
    }

    /// Runs `body`, which uses the mount, without counting as a client; nil where there is no
    /// thread for it.
    func asOwnThread<Result: Sendable>(
        _ outside: OutsideThread? = try? OutsideThread(), _ body: @escaping @Sendable () -> Result
    ) -> Result? {
        outside?.run {
            let thread = gettid()
            self.ownThreads.withLock { _ = $0.insert(thread) }
            defer { self.ownThreads.withLock { _ = $0.remove(thread) } }
            return body()
        }
    }

    /// Makes the kernel hand over every dirty page of every file that may have some.
    func flushAll() {
        for node in catalogue.allNodes where node.pointer.pointee.writerCount > 0 {
            _ = flush(node.pointer)
        }
    }

    /// Makes the kernel hand over the dirty pages of one file, if it may have some.
    func bringOut(_ node: UnsafeMutablePointer<FileNode>) {
        guard node.pointee.writerCount > 0 else { return }
        if !flush(node) { _ = dropPages(of: number(of: node)) }
    }

    /// The whole disk, or its size, is another one: the kernel forgets what it knows, and learns
    /// the size at once, which a loop device asks of nobody but the kernel.
    func diskChanged(_ node: UnsafeMutablePointer<FileNode>, restoresSize: Bool) {
        _ = dropPages(of: number(of: node))
        kernelForgetsAttributes(of: number(of: node))
        if restoresSize {
            restoreSize(of: number(of: node))
            // Whoever asked for the change finds it done, however busy the file is.
            return waitForSize(of: number(of: node), milliseconds: 10_000)
        }
        let path = path(of: node)
        _ = asOwnThread {
            var status = stat()
            return stat(path, &status)
        }
    }

    /// Makes the kernel ask again which snapshots there are.
    func namesChanged() {
        guard catalogue.showsSnapshots, let session = session.withLock({ $0 }) else { return }
        for node in catalogue.allNodes where node.pointer.pointee.source.isReadOnly {
            let name = node.pointer.pointee.name
            fuse_lowlevel_notify_inval_entry(
                session.pointer, fuse_ino_t(FUSE_ROOT_ID), name, name.utf8.count)
        }
    }

    private func number(of node: UnsafeMutablePointer<FileNode>) -> fuse_ino_t {
        catalogue.rootFile == nil
            ? fuse_ino_t(UInt(bitPattern: node)) : fuse_ino_t(FUSE_ROOT_ID)
    }

    /// Makes the kernel hand over the dirty pages of one file; false where it could not be asked.
    private func flush(
        _ node: UnsafeMutablePointer<FileNode>, _ outside: OutsideThread? = try? OutsideThread()
    ) -> Bool {
        let path = path(of: node)
        let isFlushed = asOwnThread(outside) {
            let descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW)
            guard descriptor >= 0 else { return false }
            defer { close(descriptor) }
            // All three flags: any fewer, and pages may be left behind when the kernel is busy.
            let everything = UInt32(
                SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER)
            return sync_file_range(descriptor, 0, 0, everything) == 0
        }
        return isFlushed ?? false
    }

    func path(of node: UnsafeMutablePointer<FileNode>) -> String {
        if case .file = catalogue.shape { return mountpoint }
        return mountpoint + "/" + node.pointee.name
    }

    private func node(_ number: fuse_ino_t) -> UnsafeMutablePointer<FileNode>? {
        if number == fuse_ino_t(FUSE_ROOT_ID) { return catalogue.rootFile?.pointer }
        return UnsafeMutablePointer(bitPattern: UInt(number))
    }
}

// MARK: Seeking

/// A client that waits for SEEK_DATA or SEEK_HOLE.
struct PendingSeek: @unchecked Sendable {
    // Sendable: the request belongs to whoever holds this, and the image stays open meanwhile.
    let request: fuse_req_t
    let number: fuse_ino_t
    let image: ImageAddress
    let target: SeekTarget
    let offset: UInt64
}

extension OwnAccess {
    /// Answers `pending` when the pages that the kernel holds have been written.
    func seekAfterFlush(_ pending: PendingSeek) { add(.seek(pending)) }

    private func answer(_ pending: PendingSeek, _ outside: OutsideThread?) {
        let reply = Reply(pending.request)
        if pagesAreOut(of: pending.number, outside) {
            seek(pending.target, from: pending.offset, in: pending.image.pointer, reply)
        } else {
            answerAllData(pending, reply)
        }
    }

    /// Makes the kernel hand over its dirty pages; false where it could not be asked.
    private func pagesAreOut(of number: fuse_ino_t, _ outside: OutsideThread?) -> Bool {
        node(number).map { flush($0, outside) } ?? false || dropPages(of: number)
    }

    /// Makes the kernel write and forget its pages: slower, but possible without a path.
    private func dropPages(of number: fuse_ino_t) -> Bool {
        guard let session = session.withLock({ $0 }) else { return false }
        return fuse_lowlevel_notify_inval_inode(session.pointer, number, 0, 0) == 0
    }

    /// With unknown pages about, everything counts as data: nobody loses anything by that.
    private func answerAllData(_ pending: PendingSeek, _ reply: consuming Reply) {
        let size = pending.image.pointer.pointee.size
        guard pending.offset < size else { return reply.status(ENXIO) }
        reply.offset(pending.target == .data ? pending.offset : size)
    }
}

// MARK: Reading and writing past the cache

/// A client that has written past the page cache while others may hold pages there.
struct PendingWrite: @unchecked Sendable {
    // Sendable: the request belongs to whoever holds this.
    let request: fuse_req_t
    let number: fuse_ino_t
    let offset: UInt64
    let count: Int
}

/// A client that reads past the page cache while others may have dirty pages there.
struct PendingRead: @unchecked Sendable {
    // Sendable: the request belongs to whoever holds this, and the image stays open meanwhile.
    let request: fuse_req_t
    let number: fuse_ino_t
    let handle: Handle
    let count: Int
    let offset: UInt64
}

extension OwnAccess {
    /// Answers `pending` when the pages that the kernel holds have been written.
    func readAfterFlush(_ pending: PendingRead) { add(.read(pending)) }

    /// Answers `pending` when the kernel has forgotten what it had read there before: for
    /// asynchronous writes it looks after that too early, and keeps what a reader brings in.
    func answerAfterDroppingPages(_ pending: PendingWrite) { add(.written(pending)) }

    private func answer(_ pending: PendingWrite) {
        if let session = session.withLock({ $0 }), pending.count > 0 {
            fuse_lowlevel_notify_inval_inode(
                session.pointer, pending.number, off_t(clamping: pending.offset),
                off_t(clamping: pending.count))
        }
        Reply(pending.request).written(pending.count)
    }

    private func answer(_ pending: PendingRead, _ outside: OutsideThread?) {
        guard pagesAreOut(of: pending.number, outside) else {
            return Reply(pending.request).status(EIO)
        }
        serve(pending.request) {
            read(pending.count, at: pending.offset, pending.handle, $0, $1)
        }
    }
}

// MARK: Sizes and attributes

extension OwnAccess {
    /// Makes the kernel ask for a file's attributes again.
    func kernelForgetsAttributes(of number: fuse_ino_t) {
        guard let session = session.withLock({ $0 }) else { return }
        fuse_lowlevel_notify_inval_inode(session.pointer, number, -1, 0)
    }

    /// Has the kernel told the file's true size: while it writes back, it believes its own.
    func restoreSize(of number: fuse_ino_t) {
        let isNew = queue.withLock { $0.waiting.insert(number).inserted }
        kernelForgetsAttributes(of: number)
        if isNew { sizeWakeUp.post() }
        kernelForgetsAttributes(of: number)
    }

    /// Waits for a size that the kernel is being told: a moment, where a client waits meanwhile.
    func waitForSize(of number: fuse_ino_t, milliseconds: Int = 100) {
        for _ in 0..<milliseconds / 2 {
            guard isRestoring(number), !queue.withLock({ $0.isFinished }) else { return }
            usleep(2000)
        }
    }

    /// Whether the kernel is yet to be told a file's size.
    func isRestoring(_ number: fuse_ino_t) -> Bool {
        queue.withLock { $0.waiting.contains(number) || $0.restoring == number }
    }

    /// On a thread of its own: the change of size waits for the inode's lock, which clients hold
    /// while they wait for the other jobs.
    private func restoreSizes() {
        while true {
            sizeWakeUp.wait()
            let number = queue.withLock { queue -> fuse_ino_t? in
                queue.restoring = queue.isFinished ? nil : queue.waiting.popFirst()
                return queue.restoring
            }
            if let number, let node = node(number) { tellSize(of: node) }
            queue.withLock { $0.restoring = nil }
        }
    }

    /// Sets the file to the size it has.
    func tellSize(of node: UnsafeMutablePointer<FileNode>) {
        guard let size = node.pointee.withOpenImage({ $0.pointee.size }) else { return }
        let path = path(of: node)
        _ = asOwnThread { truncate(path, off_t(clamping: size)) }
    }
}
