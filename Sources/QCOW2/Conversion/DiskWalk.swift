internal import Glibc

/// Goes over disks from the start to the end, a piece at a time, on several threads.
///
/// Pieces are handed out in order; the first error stops everything and is what `run` throws.
final class DiskWalk: Sendable {
    /// A part of the disk that is a hole everywhere, or data somewhere.
    struct Piece: Sendable {
        let range: Range<UInt64>
        let isHole: Bool
    }

    /// Bytes of the longest piece of data.
    static let pieceByteCount: UInt64 = 1 << 20

    private struct State {
        var offset: UInt64 = 0
        var failure: ImageError?
        /// What is known of each source.
        var known: [KnownRun]
    }

    private let sources: [SourceDisk]
    private let end: UInt64
    private let pieceByteCount: UInt64
    private let unitByteCount: UInt64
    private let state: Monitor<State>

    /// A walk up to `end`, or over the bytes that at least one of `sources` has, in pieces that
    /// cross no multiple of `pieceByteCount` and begin with one of `unitByteCount`, powers of two:
    /// a unit that is a hole in part is data.
    init(
        over sources: [SourceDisk], end: UInt64? = nil,
        pieceByteCount: UInt64 = DiskWalk.pieceByteCount, unitByteCount: UInt64 = 1
    ) {
        self.sources = sources
        self.pieceByteCount = pieceByteCount
        self.unitByteCount = unitByteCount
        state = Monitor(State(known: sources.map { _ in KnownRun() }))
        self.end = end ?? sources.map(\.size).max() ?? 0
    }

    /// Calls `body` for every piece, with a buffer of `bufferByteCount` bytes a thread, a piece's
    /// where nothing else is said.
    ///
    /// - Parameters:
    ///   - threadCount: Threads that work, the caller's included.
    ///   - progress: Told on the caller's thread what part is done; false cancels.
    func run(
        threadCount: Int, bufferByteCount: Int? = nil,
        progress: ((Double) -> Bool)?,
        _ body:
            @escaping @Sendable (Piece, UnsafeMutableRawBufferPointer) throws(ImageError) -> Void
    ) throws(ImageError) {
        let bufferByteCount = bufferByteCount ?? Int(pieceByteCount)
        let helpers = (1..<max(threadCount, 1)).compactMap { _ in
            Worker.start { self.work(bufferByteCount, progress: nil, body) }
        }
        work(bufferByteCount, progress: progress, body)
        for helper in helpers { pthread_join(helper, nil) }
        if let failure = state.withLock({ $0.failure }) { throw failure }
    }

    private func work(
        _ bufferByteCount: Int, progress: ((Double) -> Bool)?,
        _ body: (Piece, UnsafeMutableRawBufferPointer) throws(ImageError) -> Void
    ) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: bufferByteCount, alignment: 4096)
        defer { buffer.deallocate() }
        do throws(ImageError) {
            while let piece = try next() {
                try body(piece, buffer)
                let done = Double(piece.range.upperBound) / Double(max(end, 1))
                if let progress, !progress(done) { throw ImageError(.cancelled, file: "") }
            }
        } catch {
            state.withLock { if $0.failure == nil { $0.failure = error } }
        }
    }

    /// The next piece; nil at the end, and when something has failed.
    private func next() throws(ImageError) -> Piece? {
        try state.withLock { state throws(ImageError) in
            guard state.failure == nil, state.offset < end else { return nil }
            let start = state.offset
            var count = end &- start
            var isHole = true
            for (index, source) in sources.enumerated() where start < source.size {
                let run = try state.known[index].run(of: source, at: start)
                guard isHole || !run.isHole else { continue }
                // Where one has data the others' holes end nothing.
                if isHole && !run.isHole { count = .max }
                isHole = run.isHole
                count = min(count, run.byteCount)
            }
            let runEnd = start &+ min(count, end &- start)
            var pieceEnd = runEnd == end ? end : runEnd & ~(unitByteCount &- 1)
            if !isHole || pieceEnd == start {
                isHole = false
                let border = (start &+ pieceByteCount) & ~(pieceByteCount &- 1)
                let unitEnd = (runEnd &+ unitByteCount &- 1) & ~(unitByteCount &- 1)
                pieceEnd = min(unitEnd, border, end)
            }
            state.offset = pieceEnd
            return Piece(range: start..<pieceEnd, isHole: isHole)
        }
    }
}
