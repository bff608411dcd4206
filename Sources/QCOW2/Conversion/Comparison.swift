internal import Glibc

/// Whether two disks hold the same bytes.
public enum Comparison {
    /// What a comparison found out.
    public enum Outcome: Equatable, Sendable {
        /// Every byte is the same.
        case equal
        /// The first byte at which they differ.
        case different(offset: UInt64)
        /// `strict` was wanted and the sizes in bytes are not the same.
        case differentSizes
    }

    /// Compares `first` with `second`; a longer disk is equal when the rest of it is zero.
    ///
    /// - Parameters:
    ///   - first: One disk.
    ///   - second: The other one.
    ///   - threadCount: Threads that read, the caller's included.
    ///   - isStrict: Whether disks of different sizes differ in any case.
    ///   - progress: Told what part is done; false cancels.
    /// - Throws: what reading throws, and `.cancelled`.
    public static func compare(
        _ first: SourceDisk, _ second: SourceDisk, isStrict: Bool = false, threadCount: Int = 2,
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) -> Outcome {
        if isStrict && first.size != second.size { return .differentSizes }
        let difference = Difference()
        let half = Int(DiskWalk.pieceByteCount)
        try DiskWalk(over: [first, second]).run(
            threadCount: threadCount, bufferByteCount: 2 * half, progress: progress
        ) { piece, buffer throws(ImageError) in
            guard !piece.isHole, !difference.isBefore(piece.range.lowerBound) else { return }
            let count = Int(piece.range.upperBound &- piece.range.lowerBound)
            let one = UnsafeMutableRawBufferPointer(rebasing: buffer[..<count])
            let other = UnsafeMutableRawBufferPointer(rebasing: buffer[half..<half + count])
            try first.readPadded(into: one, at: piece.range.lowerBound)
            try second.readPadded(into: other, at: piece.range.lowerBound)
            if let index = firstDifference(
                UnsafeRawBufferPointer(one), UnsafeRawBufferPointer(other))
            {
                difference.found(at: piece.range.lowerBound &+ UInt64(index))
            }
        }
        return difference.outcome
    }

    private static func firstDifference(
        _ one: UnsafeRawBufferPointer, _ other: UnsafeRawBufferPointer
    ) -> Int? {
        guard let left = one.baseAddress, let right = other.baseAddress,
            memcmp(left, right, one.count) != 0
        else { return nil }
        return one.indices.first { one[$0] != other[$0] }
    }

    /// The first difference that any thread has found.
    private final class Difference: Sendable {
        private let offset = Monitor(UInt64.max)

        func found(at place: UInt64) { offset.withLock { $0 = min($0, place) } }

        func isBefore(_ place: UInt64) -> Bool { offset.withLock { $0 < place } }

        var outcome: Outcome {
            let place = offset.withLock { $0 }
            return place == .max ? .equal : .different(offset: place)
        }
    }
}

extension SourceDisk {
    /// Fills `buffer` from `offset` on, with zeros where the disk has ended.
    func readPadded(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(ImageError) {
        let inside = Int(min(UInt64(buffer.count), size &- min(offset, size)))
        if inside > 0 {
            try read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<inside]), at: offset)
        }
        UnsafeMutableRawBufferPointer(rebasing: buffer[inside...])
            .initializeMemory(as: UInt8.self, repeating: 0)
    }
}
