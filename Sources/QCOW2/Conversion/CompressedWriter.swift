internal import Glibc

/// Writes guest clusters compressed: several threads compress, and what they make is stored in the
/// order in which the clusters came.
///
/// One thread gives clusters, ascending or not; memory holds a few clusters for each thread that
/// compresses.  A cluster of zeros becomes a hole, and one that does not get shorter is stored as
/// it is.
public final class CompressedWriter: @unchecked Sendable {
    // `@unchecked`: a slot's buffers belong to whoever the state says is at work on it.

    /// A cluster on its way.
    private struct Slot {
        let cluster: UnsafeMutableRawBufferPointer
        let stream: UnsafeMutableRawBufferPointer
        var offset: UInt64 = 0
        /// Bytes of the cluster that lie inside of the disk.
        var byteCount = 0
    }

    private enum Outcome {
        case zeros, plain
        case stream(Int)
    }

    private struct State {
        /// How many clusters were given, taken to compress, and stored.
        var given = 0
        var taken = 0
        var stored = 0
        /// What became of the cluster in each slot; nil while that is not known.
        var outcomes: [Outcome?]
        var isStoring = false
        var isEnding = false
        var failure: ImageError?
    }

    private let image: Image
    private let compressor: Compressor
    private nonisolated(unsafe) let slots: UnsafeMutableBufferPointer<Slot>
    private let state: Monitor<State>
    private let threads = Monitor<[pthread_t]>([])

    /// - Parameters:
    ///   - image: What the clusters are written to.
    ///   - threadCount: How many threads compress.
    ///   - effort: How much time it may take.
    /// - Throws: `.invalidArgument` for an image that cannot have compressed clusters, `.readOnly`.
    public init(
        _ image: Image, threadCount: Int, effort: CompressionEffort = .usual
    ) throws(ImageError) {
        _ = try image.writer()
        try image.checkCompressible()
        self.image = image
        compressor = Compressor(
            image.header.compressionType == .zstd ? .zstd : .deflate, effort: effort)
        let count = max(threadCount, 1)
        slots = .allocate(capacity: count * 2 + 1)
        let byteCount = Int(image.clusterByteCount)
        for index in slots.indices {
            slots.initializeElement(
                at: index,
                to: Slot(
                    cluster: .allocate(byteCount: byteCount, alignment: 4096),
                    stream: .allocate(byteCount: byteCount, alignment: 4096)))
        }
        state = Monitor(State(outcomes: Array(repeating: nil, count: slots.count)))
        let started = (0..<count).compactMap { _ in Worker.start { self.work() } }
        threads.withLock { $0 = started }
        guard !started.isEmpty else {
            throw ImageError(
                .system(.last, operation: "cannot start a thread"), file: image.top.file.name)
        }
    }

    deinit {
        for slot in slots {
            slot.cluster.deallocate()
            slot.stream.deallocate()
        }
        slots.deallocate()
    }

    /// Takes the cluster at `offset`, as much of it as lies inside of the disk; returns when there
    /// is room for it in memory.
    /// - Throws: What compressing or storing an earlier cluster threw.
    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
        try image.checkRange(offset, UInt64(bytes.count))
        precondition(
            offset % image.clusterByteCount == 0 && bytes.count <= slots[0].cluster.count,
            "a cluster at a time")
        let index = try state.waitFor { state throws(ImageError) -> Int? in
            if let failure = state.failure { throw failure }
            return state.given - state.stored < slots.count ? state.given % slots.count : nil
        }
        slots[index].offset = offset
        slots[index].byteCount = bytes.count
        slots[index].cluster.copyMemory(from: bytes)
        UnsafeMutableRawBufferPointer(rebasing: slots[index].cluster[bytes.count...])
            .initializeMemory(as: UInt8.self, repeating: 0)
        state.withLock { $0.given += 1 }
        state.announceChange()
    }

    /// Returns when every cluster is stored.  No other method may be called afterwards; whoever is
    /// done with a writer calls this, also after an error.
    /// - Throws: The first thing that went wrong.
    public func finish() throws(ImageError) {
        state.withLock { $0.isEnding = true }
        state.announceChange()
        let ending = threads.withLock { threads in
            defer { threads = [] }
            return threads
        }
        for thread in ending { pthread_join(thread, nil) }
        if let failure = state.withLock({ $0.failure }) { throw failure }
    }

    // MARK: On the threads

    private func work() {
        while let index = nextToCompress() {
            let outcome = compress(slots[index])
            state.withLock { $0.outcomes[index] = outcome }
            storeReady()
        }
    }

    private func nextToCompress() -> Int? {
        state.waitFor { state -> Int?? in
            if state.failure != nil { return .some(nil) }
            if state.taken < state.given {
                state.taken += 1
                return (state.taken - 1) % slots.count
            }
            return state.isEnding ? .some(nil) : nil
        }
    }

    private func compress(_ slot: Slot) -> Outcome {
        let cluster = UnsafeRawBufferPointer(slot.cluster)
        if ZeroScan.isZero(cluster) { return .zeros }
        return compressor.compress(cluster, into: slot.stream).map(Outcome.stream) ?? .plain
    }

    /// Stores what is ready, in order, unless another thread is at it: that one goes on with it.
    private func storeReady() {
        while let (index, outcome) = state.withLock({ nextToStore(&$0) }) {
            var failure: ImageError?
            do throws(ImageError) { try store(slots[index], outcome) } catch { failure = error }
            state.withLock { state in
                state.outcomes[index] = nil
                state.stored += 1
                state.isStoring = false
                if state.failure == nil { state.failure = failure }
            }
            state.announceChange()
        }
    }

    private func nextToStore(_ state: inout State) -> (Int, Outcome)? {
        let index = state.stored % slots.count
        guard !state.isStoring, state.failure == nil, let outcome = state.outcomes[index] else {
            return nil
        }
        state.isStoring = true
        return (index, outcome)
    }

    private func store(_ slot: Slot, _ outcome: Outcome) throws(ImageError) {
        switch outcome {
        case .zeros:
            try image.writeZeroes(slot.offset..<slot.offset &+ UInt64(slot.byteCount))
        case .plain:
            try image.write(
                UnsafeRawBufferPointer(rebasing: slot.cluster[..<slot.byteCount]), at: slot.offset)
        case .stream(let byteCount):
            try image.writeStream(
                UnsafeRawBufferPointer(rebasing: slot.stream[..<byteCount]), at: slot.offset)
        }
    }
}
