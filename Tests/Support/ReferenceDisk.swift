internal import Glibc

/// The model of a virtual disk: a sparse array of bytes, nothing else.
///
/// Threads may use it at once as long as no two touch the same bytes (`RangeReservations`).
package final class ReferenceDisk: @unchecked Sendable {
    package let byteCount: Int
    package let bytes: UnsafeMutableRawBufferPointer

    package init(byteCount: Int) {
        self.byteCount = byteCount
        // Anonymous memory reads as zeros and takes no room where nothing was written.
        let memory = mmap(
            nil, max(byteCount, 1), PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS
                | MAP_NORESERVE, -1, 0)
        precondition(memory != MAP_FAILED, "no room for a model of \(byteCount) bytes")
        bytes = UnsafeMutableRawBufferPointer(start: memory, count: byteCount)
    }

    deinit { munmap(bytes.baseAddress, max(byteCount, 1)) }

    package func write(_ source: UnsafeRawBufferPointer, at offset: Int) {
        self[offset..<offset + source.count].copyMemory(from: source)
    }

    package func zero(_ range: Range<Int>) {
        memset(self[range].baseAddress!, 0, range.count)
    }

    package subscript(_ range: Range<Int>) -> UnsafeMutableRawBufferPointer {
        UnsafeMutableRawBufferPointer(rebasing: bytes[range])
    }

    /// Where `range` differs from `other` first, nil where it does not.
    package func firstDifference(
        in range: Range<Int>, from other: UnsafeRawBufferPointer
    ) -> Int? {
        let mine = self[range]
        if other.count == mine.count,
            mine.isEmpty || memcmp(mine.baseAddress!, other.baseAddress!, mine.count) == 0
        {
            return nil
        }
        return (0..<min(mine.count, other.count)).first { mine[$0] != other[$0] }
            .map { range.lowerBound + $0 } ?? range.upperBound
    }

    /// Stores the disk as a raw file with holes.
    package func save(to path: String) throws {
        let file = try TestFile(path, O_WRONLY | O_CREAT | O_TRUNC)
        try file.truncate(to: byteCount)
        let block = 64.KiB
        for start in stride(from: 0, to: byteCount, by: block) {
            let part = self[start..<min(start + block, byteCount)]
            if !UnsafeRawBufferPointer(part).isZero {
                try file.write(UnsafeRawBufferPointer(part), at: start)
            }
        }
    }

    /// A model with the content of a raw file.
    package convenience init(contentsOf path: String) throws {
        let file = try TestFile(path, O_RDONLY)
        self.init(byteCount: try file.byteCount())
        try file.read(into: bytes, at: 0)
    }
}
