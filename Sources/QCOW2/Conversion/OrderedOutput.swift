internal import Glibc

/// Writes pieces to a pipe in their order, while several threads make them.
final class OrderedOutput: Sendable {
    /// What is written next.
    enum Piece: Sendable {
        /// Bytes that are there already.
        case bytes([UInt8])
        case zeros(UInt64)
        /// Bytes of a disk from `offset` on, filled up with zeros to `byteCount`, a buffer's length
        /// at most.
        case disk(offset: UInt64, count: Int, byteCount: Int)
    }

    /// Bytes of the longest piece of a disk: no cluster is longer.
    static let pieceByteCount = 2 << 20

    private struct Handing {
        var number = 0
        var isDone = false
    }

    private struct Turn {
        /// The piece that is written next.
        var number = 0
        var failure: ImageError?
    }

    private let descriptor: Int32
    private let name: String
    private let handing = Monitor(Handing())
    private let turn = Monitor(Turn())

    /// - Parameter descriptor: its owner's; it is not closed here.
    init(_ descriptor: Int32, name: String) {
        self.descriptor = descriptor
        self.name = name
    }

    /// Writes what `next` hands out until it answers nil.
    ///
    /// - Parameters:
    ///   - source: whose bytes the pieces of a disk are.
    ///   - next: called by one thread at a time.
    ///   - progress: told on the caller's thread, in bytes of the disk; false cancels.
    /// - Throws: the first error of any thread.
    func run(
        from source: SourceDisk, threadCount: Int, progress: ((UInt64) -> Bool)?,
        next: @escaping @Sendable () throws(ImageError) -> Piece?
    ) throws(ImageError) {
        let helpers = (1..<max(threadCount, 1)).compactMap { _ in
            Worker.start { self.work(source, nil, next) }
        }
        work(source, progress, next)
        for helper in helpers { pthread_join(helper, nil) }
        if let failure = turn.withLock({ $0.failure }) { throw failure }
    }

    private func work(
        _ source: SourceDisk, _ progress: ((UInt64) -> Bool)?,
        _ next: () throws(ImageError) -> Piece?
    ) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Self.pieceByteCount, alignment: 4096)
        defer { buffer.deallocate() }
        do throws(ImageError) {
            while let (number, piece) = try take(next) {
                if case .disk(let offset, let count, let byteCount) = piece {
                    try source.read(
                        into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]), at: offset)
                    UnsafeMutableRawBufferPointer(rebasing: buffer[count..<byteCount])
                        .initializeMemory(as: UInt8.self, repeating: 0)
                }
                try waitForTurn(number)
                try write(piece, UnsafeRawBufferPointer(buffer))
                turn.withLock { $0.number += 1 }
                turn.announceChange()
                if case .disk(let offset, let count, _) = piece, let progress,
                    !progress(offset + UInt64(count))
                {
                    throw ImageError(.cancelled, file: name)
                }
            }
        } catch {
            turn.withLock { if $0.failure == nil { $0.failure = error } }
            turn.announceChange()
        }
    }

    private func take(
        _ next: () throws(ImageError) -> Piece?
    ) throws(ImageError) -> (Int, Piece)? {
        try handing.withLock { handing throws(ImageError) in
            guard !handing.isDone, turn.withLock({ $0.failure == nil }) else { return nil }
            guard let piece = try next() else {
                handing.isDone = true
                return nil
            }
            defer { handing.number += 1 }
            return (handing.number, piece)
        }
    }

    private func waitForTurn(_ number: Int) throws(ImageError) {
        try turn.waitFor { turn throws(ImageError) -> Void? in
            if let failure = turn.failure { throw failure }
            return turn.number == number ? () : nil
        }
    }

    // MARK: Writing

    private func write(_ piece: Piece, _ buffer: UnsafeRawBufferPointer) throws(ImageError) {
        switch piece {
        case .bytes(let bytes):
            try bytes.withRawBytes { bytes throws(ImageError) in try write(bytes) }
        case .zeros(let byteCount):
            var left = byteCount
            while left > 0 {
                let count = min(left, UInt64(ZeroArea.byteCount))
                try write(UnsafeRawBufferPointer(rebasing: ZeroArea.bytes[..<Int(count)]))
                left -= count
            }
        case .disk(_, _, let byteCount):
            try write(UnsafeRawBufferPointer(rebasing: buffer[..<byteCount]))
        }
    }

    private func write(_ bytes: UnsafeRawBufferPointer) throws(ImageError) {
        do throws(SystemError) {
            try writeToPipe(descriptor, bytes)
        } catch {
            throw ImageError(.system(error, operation: "cannot write"), file: name)
        }
    }
}

/// Writes all of `bytes` to a descriptor that has no offsets.
func writeToPipe(_ descriptor: Int32, _ bytes: UnsafeRawBufferPointer) throws(SystemError) {
    var done = 0
    while done < bytes.count {
        done += try retryingInterrupts {
            write(descriptor, bytes.baseAddress.map { $0 + done }, bytes.count - done)
        }
    }
}
