private import Synchronization

/// A device in memory that grows as it is written, sparse like a file.
public final class RAMDisk: BlockDevice {
    public let name: String

    private struct Contents {
        var byteCount: UInt64
        /// The pieces that were written, by offset / `pieceByteCount`; the others read as zeros.
        /// Bytes past `byteCount` inside a piece are zero.
        var pieces: [UInt64: [UInt8]] = [:]
    }

    private static let pieceByteCount: UInt64 = 65536
    private let contents: Mutex<Contents>

    /// A device of `byteCount` zero bytes, which take no memory until they are written.
    public init(byteCount: UInt64 = 0, name: String = "RAM disk") {
        self.name = name
        contents = Mutex(Contents(byteCount: byteCount))
    }

    public func byteCount() throws(SystemError) -> UInt64 { contents.withLock { $0.byteCount } }

    public func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        contents.withLock { contents in
            guard offset < contents.byteCount else { return 0 }
            // Not more than the buffer holds, hence an Int.
            let count = Int(min(UInt64(buffer.count), contents.byteCount - offset))
            Self.forEachPart(of: offset..<offset + UInt64(count)) { part in
                let target = UnsafeMutableRawBufferPointer(
                    rebasing: buffer[part.done..<part.done + part.count])
                if let piece = contents.pieces[part.piece] {
                    piece.withUnsafeBytes {
                        target.copyMemory(
                            from: UnsafeRawBufferPointer(
                                rebasing: $0[part.start..<part.start + part.count]))
                    }
                } else {
                    target.initializeMemory(as: UInt8.self, repeating: 0)
                }
            }
            return count
        }
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        let end = offset.addingReportingOverflow(UInt64(bytes.count))
        if end.overflow { throw .noSpace }
        contents.withLock { contents in
            Self.forEachPart(of: offset..<end.partialValue) { part in
                let source = UnsafeRawBufferPointer(
                    rebasing: bytes[part.done..<part.done + part.count])
                contents.pieces[part.piece, default: Self.emptyPiece].withUnsafeMutableBytes {
                    UnsafeMutableRawBufferPointer(
                        rebasing: $0[part.start..<part.start + part.count]
                    ).copyMemory(from: source)
                }
            }
            contents.byteCount = max(contents.byteCount, end.partialValue)
        }
    }

    /// Memory is as stable as this device gets: nothing happens, and nothing is thrown.
    public func flush() throws(SystemError) {}

    public func resize(to byteCount: UInt64) throws(SystemError) {
        contents.withLock { contents in
            if byteCount < contents.byteCount {
                Self.clear(byteCount..<contents.byteCount, in: &contents)
            }
            contents.byteCount = byteCount
        }
    }

    public func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        contents.withLock { contents in
            Self.clear(range.clamped(to: 0..<contents.byteCount), in: &contents)
        }
    }

    public func nextData(from offset: UInt64) throws(SystemError) -> UInt64? {
        contents.withLock { contents in
            guard offset < contents.byteCount else { return nil }
            let first = offset / Self.pieceByteCount
            if contents.pieces[first] != nil { return offset }
            let next = contents.pieces.keys.lazy.filter { $0 > first }.min()
            return next.map { $0 * Self.pieceByteCount }
        }
    }

    public func nextHole(from offset: UInt64) throws(SystemError) -> UInt64 {
        contents.withLock { contents in
            guard offset < contents.byteCount else { return offset }
            var piece = offset / Self.pieceByteCount
            guard contents.pieces[piece] != nil else { return offset }
            while contents.pieces[piece] != nil { piece += 1 }
            let start = piece.multipliedReportingOverflow(by: Self.pieceByteCount)
            return start.overflow
                ? contents.byteCount : min(start.partialValue, contents.byteCount)
        }
    }

    public var readsZerosPastEnd: Bool { true }

    // MARK: Pieces

    private static var emptyPiece: [UInt8] { Array(repeating: 0, count: Int(pieceByteCount)) }

    private struct Part {
        let piece: UInt64
        /// Where the part starts in its piece.
        let start: Int
        let count: Int
        /// Bytes of the range before this part.
        let done: Int
    }

    private static func forEachPart(of range: Range<UInt64>, _ body: (Part) -> Void) {
        var offset = range.lowerBound
        while offset < range.upperBound {
            let start = offset % pieceByteCount
            let count = min(pieceByteCount - start, range.upperBound - offset)
            body(
                Part(
                    piece: offset / pieceByteCount, start: Int(start), count: Int(count),
                    done: Int(offset - range.lowerBound)))
            offset += count
        }
    }

    /// Drops whole pieces, by those that exist: a range may span far more than there are.
    private static func clear(_ range: Range<UInt64>, in contents: inout Contents) {
        guard !range.isEmpty else { return }
        let pieces = range.lowerBound / pieceByteCount...(range.upperBound - 1) / pieceByteCount
        for piece in contents.pieces.keys.filter(pieces.contains) {
            // A piece that exists starts below 2^64, its end may be just there.
            let start = piece * pieceByteCount
            let last = start + (pieceByteCount - 1)
            if range.lowerBound <= start && last < min(range.upperBound, contents.byteCount) {
                contents.pieces[piece] = nil
                continue
            }
            let lower = Int(max(range.lowerBound, start) - start)
            let upper = Int(min(range.upperBound - 1, last) - start)
            contents.pieces[piece]?.withUnsafeMutableBytes { bytes in
                _ = UnsafeMutableRawBufferPointer(rebasing: bytes[lower...upper])
                    .initializeMemory(as: UInt8.self, repeating: 0)
            }
        }
    }
}
