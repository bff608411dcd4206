internal import Glibc

/// Sizes in a test's own words: `64.KiB`.
extension BinaryInteger {
    package var KiB: Self { self * 1024 }
    package var MiB: Self { self * 1024 * 1024 }
}

extension [UInt8] {
    /// The big-endian number at `offset`; zeros where the bytes have ended.
    package func number<Number: FixedWidthInteger>(at offset: Int, as _: Number.Type) -> Number {
        withUnsafeBytes { $0.number(at: offset, as: Number.self) }
    }

    /// Stores `number` big-endian at `offset`, growing the bytes where they end before it.
    package mutating func put<Number: FixedWidthInteger>(_ number: Number, at offset: Int) {
        let end = offset + MemoryLayout<Number>.size
        if end > count { append(contentsOf: [UInt8](repeating: 0, count: end - count)) }
        withUnsafeMutableBytes {
            $0.storeBytes(of: number.bigEndian, toByteOffset: offset, as: Number.self)
        }
    }

    /// Stores `bytes` at `offset`, growing where needed.
    package mutating func put(_ bytes: [UInt8], at offset: Int) {
        let end = offset + bytes.count
        if end > count { append(contentsOf: [UInt8](repeating: 0, count: end - count)) }
        // One copy of memory, which is fast without optimization too.
        withUnsafeMutableBytes { target in
            bytes.withUnsafeBytes {
                UnsafeMutableRawBufferPointer(rebasing: target[offset..<end]).copyMemory(from: $0)
            }
        }
    }
}

extension UnsafeRawBufferPointer {
    /// The big-endian number at `offset`; bytes outside of the buffer count as zeros.
    @inline(__always)
    package func number<Number: FixedWidthInteger>(at offset: Int, as _: Number.Type) -> Number {
        let size = MemoryLayout<Number>.size
        if offset >= 0, offset <= count - size {
            return Number(bigEndian: loadUnaligned(fromByteOffset: offset, as: Number.self))
        }
        var number: Number = 0
        for index in 0..<size {
            let position = offset &+ index
            let byte = position >= 0 && position < count ? self[position] : 0
            number = Number(
                truncatingIfNeeded: (UInt64(truncatingIfNeeded: number) << 8)
                    | UInt64(byte))
        }
        return number
    }

    /// Whether every byte is zero.
    package var isZero: Bool {
        guard let first = self.first else { return true }
        return first == 0
            && (count == 1
                || memcmp(baseAddress!, baseAddress!.advanced(by: 1), count - 1) == 0)
    }
}
