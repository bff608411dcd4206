internal import Glibc

/// Looking for zeros in memory.
enum ZeroScan {
    /// Bytes that are looked at in one call: two such areas stay in a processor's first cache.
    private static let stepByteCount = 4096

    /// Whether every byte is zero.
    static func isZero(_ bytes: UnsafeRawBufferPointer) -> Bool {
        guard let base = bytes.baseAddress else { return true }
        var done = 0
        while done < bytes.count {
            // The C library's comparison uses the widest vectors that the processor has.
            let count = min(stepByteCount, bytes.count &- done)
            guard memcmp(base + done, ZeroArea.start, count) == 0 else { return false }
            done &+= count
        }
        return true
    }

    /// The run of units from index `start` on that are all zero, or all not: the answer for the
    /// first unit, and where the run ends.
    ///
    /// - Parameter place: Where the bytes lie on the disk: units end at multiples of
    ///   `unitByteCount` there, the first and the last one here may be shorter.
    static func run(
        in bytes: UnsafeRawBufferPointer, from start: Int, at place: UInt64, unitByteCount: UInt64
    ) -> (isZero: Bool, end: Int) {
        func unit(from index: Int) -> UnsafeRawBufferPointer {
            let rest = unitByteCount &- (place &+ UInt64(index)) % unitByteCount
            let end = index &+ Int(min(rest, UInt64(bytes.count &- index)))
            return UnsafeRawBufferPointer(rebasing: bytes[index..<end])
        }
        let first = unit(from: start)
        let isFirstZero = isZero(first)
        var end = start &+ first.count
        while end < bytes.count {
            let next = unit(from: end)
            guard isZero(next) == isFirstZero else { break }
            end &+= next.count
        }
        return (isFirstZero, end)
    }
}
