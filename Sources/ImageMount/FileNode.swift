internal import Glibc
internal import QCOW2
internal import Synchronization

/// One file of a mount: a name, and the image behind it while that is open.
///
/// Lies at a fixed address for as long as the mount lives: the address is the number by which the
/// kernel calls the file.
struct FileNode: ~Copyable, Sendable {
    let name: String
    let inodeNumber: UInt64
    let source: NodeSource
    /// Which file the image was when the node was made; another one of this name is another node.
    let identity: FileIdentity?
    private let state: Mutex<State>

    private struct State: Sendable {
        var image: ImageAddress?
        var counts = OpenCounts()
        /// Handles by which this process flushes the file's own dirty pages.
        var ownHandleCount = 0
        /// Whether the kernel may still hold pages of an image that was closed in between.
        var wasClosed = false
        /// Whether the image stays open without handles, until the mount ends.
        let isPermanent: Bool
    }

    /// A file whose image is open from the start and stays so.
    init(name: String, opener: ImageOpener, image: consuming MountedImage) {
        self.init(
            name: name, source: .image(opener), identity: nil, address: ImageAddress(image))
    }

    /// A file whose image is opened by the first client and closed after the last one.
    init(name: String, opener: ImageOpener, identity: FileIdentity) {
        self.init(name: name, source: .image(opener), identity: identity, address: nil)
    }

    /// A snapshot beside its disk.
    init(name: String, snapshot: SnapshotSource) {
        self.init(name: name, source: .snapshot(snapshot), identity: nil, address: nil)
    }

    private init(
        name: String, source: NodeSource, identity: FileIdentity?, address: ImageAddress?
    ) {
        self.name = name
        self.source = source
        self.identity = identity
        inodeNumber = ExposedName.inodeNumber(of: name)
        state = Mutex(State(image: address, isPermanent: address != nil))
    }

    var isPermanent: Bool { state.withLock { $0.isPermanent } }
    /// Handles by which the kernel's pages can become dirty.
    var writerCount: Int { state.withLock { $0.counts.cachedWriterCount } }
    /// Handles that read and write through the kernel's pages.
    var cachedHandleCount: Int { state.withLock { $0.counts.cachedHandleCount } }

    /// Has a look at the image, where it is open; it stays open until `body` returns.
    borrowing func withOpenImage<Result: Sendable>(
        _ body: (UnsafeMutablePointer<MountedImage>) -> Result
    ) -> Result? {
        state.withLock { state in
            guard let image = state.image else { return nil }
            return body(image.pointer)
        }
    }
}

/// Opening and closing.
extension FileNode {
    /// What an open is answered: whose handle it is and how it may use the cache.
    struct Opening: Sendable {
        let image: ImageAddress
        let mode: OpenCounts.Mode
        /// Whether pages that the kernel has are still those of the image.
        let keepsCache: Bool
    }

    /// Opens the file for a client, and the image where it is not open.
    borrowing func open(isWriter: Bool, prefersDirect: Bool) throws(SystemError) -> Opening {
        if prefersDirect { waitForWriters() }
        return try locked { state throws(SystemError) in
            let image = try Self.image(in: &state, source: source)
            let isFresh = state.counts.handleCount == 0 && state.wasClosed
            if isFresh { state.wasClosed = false }
            let mode = state.counts.admit(isWriter: isWriter, prefersDirect: prefersDirect)
            return Opening(image: image, mode: mode, keepsCache: !isFresh)
        }
    }

    /// Gives cached writers a moment to go: a client's close returns before we hear of it, and one
    /// that closes and opens again should get what it asks for.
    private borrowing func waitForWriters() {
        for _ in 0..<15 where writerCount > 0 { usleep(200) }
    }

    /// Opens the file for this process itself, which only flushes what the kernel holds.
    borrowing func openForFlushing() throws(SystemError) -> Opening {
        try locked { state throws(SystemError) in
            guard let image = state.image else { throw SystemError(code: ENOENT) }
            state.ownHandleCount += 1
            return Opening(image: image, mode: .cached, keepsCache: true)
        }
    }

    borrowing func close(isWriter: Bool, mode: OpenCounts.Mode) {
        state.withLock { state in
            state.counts.leave(isWriter: isWriter, mode: mode)
            Self.closeIfUnused(&state, source)
        }
    }

    /// Opens the image, where it is not open, for one of its snapshots: `closeAfterFlushing` ends
    /// that.
    borrowing func openForSnapshot() throws(SystemError) -> Opening {
        try locked { state throws(SystemError) in
            let image = try Self.image(in: &state, source: source)
            state.ownHandleCount += 1
            return Opening(image: image, mode: .cached, keepsCache: true)
        }
    }

    borrowing func closeAfterFlushing() {
        state.withLock { state in
            state.ownHandleCount -= 1
            Self.closeIfUnused(&state, source)
        }
    }

    /// Closes the image for good, whoever uses it, and returns why it could not be written.
    borrowing func finish() -> ImageError? {
        let image = state.withLock { state -> ImageAddress? in
            defer { state.image = nil }
            return state.image
        }
        return image?.closeImage()
    }

    private static func image(
        in state: inout State, source: NodeSource
    ) throws(SystemError) -> ImageAddress {
        if let image = state.image { return image }
        let image = try source.openWhileServing()
        state.image = image
        return image
    }

    private static func closeIfUnused(_ state: inout State, _ source: NodeSource) {
        guard !state.isPermanent, state.counts.handleCount == 0, state.ownHandleCount == 0 else {
            return
        }
        guard let image = state.image else { return }
        state.image = nil
        state.wasClosed = true
        if let error = image.closeImage() { image.pointer.pointee.log.report(error) }
        image.free()
        source.wasClosed()
    }

    /// `withLock` with a typed error.
    private borrowing func locked<Result: Sendable>(
        _ body: (inout State) throws(SystemError) -> Result
    ) throws(SystemError) -> Result {
        let outcome: Swift.Result<Result, SystemError> = state.withLock { state in
            do throws(SystemError) {
                return .success(try body(&state))
            } catch {
                return .failure(error)
            }
        }
        return try outcome.get()
    }
}

/// Where a mounted image lies; it stays there until `free`.
struct ImageAddress: @unchecked Sendable {
    // Sendable: what lies there is, and the address never changes.
    let pointer: UnsafeMutablePointer<MountedImage>

    init(_ image: consuming MountedImage) {
        pointer = .allocate(capacity: 1)
        pointer.initialize(to: image)
    }

    init(pointer: UnsafeMutablePointer<MountedImage>) { self.pointer = pointer }

    /// Writes everything and closes the image; returns why it could not be written.
    func closeImage() -> ImageError? {
        do throws(ImageError) {
            try pointer.pointee.image.close()
            return nil
        } catch {
            return error
        }
    }

    /// Gives the memory back; nobody may have the address any more.
    func free() {
        pointer.deinitialize(count: 1)
        pointer.deallocate()
    }
}

/// Which file it is, whatever it is called.
struct FileIdentity: Sendable, Equatable {
    let device: UInt64
    let inode: UInt64

    init(_ status: stat) {
        device = UInt64(status.st_dev)
        inode = UInt64(status.st_ino)
    }
}
