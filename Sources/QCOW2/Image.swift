internal import Glibc
internal import Logging
internal import Synchronization

/// The virtual disk of a qcow2 image: guest bytes, over the layers of its backing chain.
///
/// Any method may be called from any thread.  Offsets and counts are bytes of the virtual disk.
///
/// Locks, in the order in which they are taken:
///
/// 1. `structure`: resizing, starting to write, closing;
/// 2. range locks, ascending (`RangeLocks`);
/// 3. `tables`: replacing an L2 table;
/// 4. the commit's token; a commit never takes a range lock, so a writer may wait for one;
/// 5. the cluster map's lock;
/// 6. the allocator's lock, then the guard's and the header's.
public final class Image: Sendable {
    /// What lies below an image that was opened on a device instead of a path.
    public enum Backing: Sendable {
        /// An image, whose own backing file is not looked for.
        case qcow2(any BlockDevice)
        /// A raw disk.
        case raw(any BlockDevice)
    }

    /// The layers, top first.
    nonisolated(unsafe) let layers: UnsafeMutablePointer<Layer>
    let layerCount: Int
    /// The end of the longest layer below the top one: past it nothing shows through.
    let backingEnd: UInt64
    let currentSize: Atomic<UInt64>
    let ranges: RangeLocks
    let decompressed: DecompressedCache
    nonisolated(unsafe) let zeroes = ZeroArea.start
    /// What only a writable image has.
    let writing: Writing?
    let allocation: AllocationCounter
    let logger: Logger
    /// The internal snapshots, once somebody asked for them.
    let snapshotList = Monitor<SnapshotList?>(nil)
    /// The image whose snapshot this one shows, and where the snapshot's L1 table lies.
    private let parent: Image?
    private let viewedL1Offset: UInt64
    /// Whether the image whose snapshot this one shows is closed with it.
    let closesParent = Atomic(false)
    private let closing = Monitor(Closing())

    private struct Closing {
        var isClosed = false
        var workers: [pthread_t] = []
    }

    /// The parts that change an image.
    final class Writing: Sendable {
        let file: HostFile
        let map: ClusterMap
        let header: HeaderSector
        let guarded: MetadataGuard
        let allocator: ClusterAllocator
        let commit: Commit
        /// 1 per L1 entry whose table was found to lie where no other metadata is.
        let checkedTables: Monitor<Set<UInt64>>
        let tables = Monitor(())
        let structure = Monitor(())
        /// Whether what must precede the first write was done.
        let hasBegun = Atomic(false)
        let scratch = ScratchPool()
        let capture = SnapshotCapture()
        /// Changes of the snapshots that are under way, or were given up half-way: as long as there
        /// are any, counts may be too high and COPIED flags wrong.
        let unfinishedChangeCount = Atomic(0)
        let bitmaps = BitmapSession()

        init(
            file: HostFile, map: ClusterMap, header: HeaderSector, guarded: MetadataGuard,
            allocator: ClusterAllocator, commit: Commit
        ) {
            self.file = file
            self.map = map
            self.header = header
            self.guarded = guarded
            self.allocator = allocator
            self.commit = commit
            checkedTables = Monitor([])
        }
    }

    /// - Parameters:
    ///   - viewedL1Offset: where the L1 table of the snapshot lies that the image shows.
    ///   - parent: the image that has the snapshot, and the files.
    init(
        _ chain: consuming OpenedChain, viewing viewedL1Offset: UInt64 = 0, of parent: Image? = nil
    ) throws(ImageError) {
        let all = UnsafeBufferPointer(start: chain.layers, count: chain.layerCount)
        let clusters = all.indices.map { Int(all[$0].header?.clusterByteCount ?? 512) }
        decompressed = try DecompressedCache(
            byteCount: chain.options.decompressedCacheByteCount,
            clusterByteCount: clusters.max() ?? 512)
        self.parent = parent
        self.viewedL1Offset = viewedL1Offset
        layers = chain.layers
        layerCount = chain.layerCount
        chain.isTaken = true
        backingEnd = all.indices.dropFirst().map { all[$0].size }.max() ?? 0
        currentSize = Atomic(layers[0].size)
        ranges = RangeLocks(clusterBits: layers[0].header?.clusterBits ?? 16)
        writing = chain.writing
        allocation = AllocationCounter(
            keepsShown: all.indices.dropFirst().contains { all[$0].isRaw })
        logger = chain.options.logger
    }

    deinit {
        if !isClosing { parent?.endView(of: viewedL1Offset) }
        layers.deinitialize(count: layerCount)
        layers.deallocate()
    }

    // MARK: What it is

    /// Bytes of the virtual disk: the header's size rounded down to a multiple of 512.
    @inline(__always)
    public var size: UInt64 { currentSize.load(ordering: .acquiring) }

    /// Whether `write` and its relatives throw `.readOnly`.
    public var isReadOnly: Bool { writing == nil }

    /// Whether any file of the chain keeps its guest data encrypted.
    public var isEncrypted: Bool { (0..<layerCount).contains { layers[$0].isEncrypted } }

    /// The top layer's header as it was at open.
    public var header: Header {
        guard let header = top.header else { preconditionFailure("the top layer is a qcow2 image") }
        return header
    }

    /// Bytes of a cluster of the top layer.
    public var clusterByteCount: UInt64 { map.clusterMask &+ 1 }

    /// Files of the chain, top first.
    public var files: [String] { (0..<layerCount).map { layers[$0].file.name } }

    /// The files in which the layers' guest data lies, top first.
    public var dataFiles: [String] { (0..<layerCount).map { layers[$0].data.name } }

    /// Which file each layer lies in; nil for one that lies in none.
    package var identities: [FileDevice.Identity?] {
        (0..<layerCount).map { (layers[$0].file.device as? FileDevice)?.identity }
    }

    var top: Layer {
        @inline(__always) unsafeAddress { UnsafePointer(layers) }
    }

    /// The top layer's map.
    @inline(__always)
    var map: ClusterMap {
        layers.pointee.map
    }

    // MARK: Closing

    /// Commits everything and closes the files, which unlocks them.
    ///
    /// Idempotent.  No other method may be running or be called afterwards.
    /// - Throws: what the last writes and syncs said; the files are closed all the same.
    public func close() throws(ImageError) {
        // The files below a snapshot's view are those of its image.
        defer { if parent == nil { for index in 0..<layerCount { layers[index].close() } } }
        try finish()
    }

    /// Commits everything and leaves the files open.
    func finish() throws(ImageError) {
        let workers = closing.withLock { state -> [pthread_t]? in
            if state.isClosed { return nil }
            state.isClosed = true
            return state.workers
        }
        guard let workers else { return }
        closing.announceChange()
        for worker in workers { pthread_join(worker, nil) }
        // A request whose reply has been given may still hold its range: it leaves before the
        // memory goes.
        ranges.lockEverything()
        defer { ranges.unlockEverything() }
        if let parent { return try close(viewOf: parent) }
        guard let writing else { return }
        guard writing.hasBegun.load(ordering: .acquiring) else { return }
        try writing.commit.finish()
        try saveBitmaps(writing)
        if writing.unfinishedChangeCount.load(ordering: .acquiring) > 0 {
            let header = try Header.readSupported(from: writing.file.device)
            try writing.rebuildRefcounts(header, map: map, file: writing.file)
        }
    }

    /// The files are the parent's.
    private func close(viewOf parent: Image) throws(ImageError) {
        parent.endView(of: viewedL1Offset)
        if closesParent.load(ordering: .relaxed) { try parent.close() }
    }

    /// Starts a thread that commits what is dirty every `interval`, so that a killed process loses
    /// no more than that; it ends with `close()`.
    public func startCommitting(every interval: Duration) {
        guard let writing else { return }
        let seconds =
            Double(interval.components.seconds) + Double(interval.components.attoseconds) / 1e18
        startWorker { image in
            while !image.waitForClosing(seconds: max(seconds, 0.001)) {
                do throws(ImageError) {
                    try writing.commit.tidy()
                } catch {
                    image.logger.error("commit in the background: \(error)")
                }
            }
        }
    }

    /// Runs `body` on a thread of its own until the image closes; `close()` waits for its end.
    func startWorker(_ body: @escaping @Sendable (Image) -> Void) {
        let thread = Worker.start { [unowned self] in body(self) }
        guard let thread else {
            logger.error("cannot start a thread: \(SystemError.last)")
            return
        }
        closing.withLock { $0.workers.append(thread) }
    }

    /// Waits for `close()` at most `seconds`; true when it was called.
    func waitForClosing(seconds: Double) -> Bool {
        closing.wait(seconds: seconds) { $0.isClosed }
        return isClosing
    }

    var isClosing: Bool { closing.withLock { $0.isClosed } }

    // MARK: Judging requests

    /// Throws unless `offset ..< offset + count` is inside of the disk.
    @inline(__always)
    func checkRange(_ offset: UInt64, _ count: UInt64) throws(ImageError) {
        guard count <= size, offset <= size &- count else { throw outside(offset, count) }
    }

    private func outside(_ offset: UInt64, _ count: UInt64) -> ImageError {
        ImageError(
            .invalidArgument("\(count) bytes at \(offset) are outside of the disk (\(size) bytes)"),
            file: top.file.name)
    }

    /// The parts that write, or the reason why there are none.
    func writer() throws(ImageError) -> Writing {
        guard let writing else { throw notWritable }
        return writing
    }

    var notWritable: ImageError { ImageError(.readOnly, file: top.file.name) }
}
