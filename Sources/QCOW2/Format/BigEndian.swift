/// Big-endian integers in raw bytes: the only way on-disk numbers become Swift integers.
extension UnsafeRawBufferPointer {
    /// The big-endian integer at `offset`, or nil where the bytes end before it does.
    @inline(__always)
    package func bigEndian<Integer: FixedWidthInteger & BitwiseCopyable>(
        at offset: Int, as type: Integer.Type = Integer.self
    ) -> Integer? {
        let size = MemoryLayout<Integer>.size
        guard offset >= 0, count >= size, offset <= count &- size else { return nil }
        return Integer(bigEndian: loadUnaligned(fromByteOffset: offset, as: Integer.self))
    }
}

extension UnsafeMutableRawBufferPointer {
    /// Stores `value` big-endian at `offset`; the caller has made the room.
    @inline(__always)
    package func storeBigEndian<Integer: FixedWidthInteger & BitwiseCopyable>(
        _ value: Integer, at offset: Int
    ) {
        storeBytes(of: value.bigEndian, toByteOffset: offset, as: Integer.self)
    }
}

extension Array where Element == UInt8 {
    /// Stores `value` big-endian at `offset`; the caller has made the room.
    package mutating func storeBigEndian<Integer: FixedWidthInteger & BitwiseCopyable>(
        _ value: Integer, at offset: Int
    ) {
        withUnsafeMutableBytes { $0.storeBigEndian(value, at: offset) }
    }
}
