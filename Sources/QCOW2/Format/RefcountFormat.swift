/// One entry of the refcount table.
///
/// | bits | meaning                                                              |
/// |------|----------------------------------------------------------------------|
/// | 0–8  | reserved, 0                                                          |
/// | 9–63 | host offset of the refcount block, cluster aligned; 0: none, all 0   |
package struct RefcountTableEntry: Equatable, Sendable {
    package var bits: UInt64
    package init(bits: UInt64) { self.bits = bits }
    package var offset: UInt64 { bits & ~511 }
    package var reservedBits: UInt64 { bits & 511 }
}

/// How refcounts of 1 to 64 bits lie in the bytes of a refcount block: widths below a byte from
/// the least significant bit up, the others big-endian.
package struct RefcountFormat: Equatable, Sendable {
    /// A refcount has `1 << order` bits; 0…6.
    package let order: UInt32

    package init(order: UInt32) { self.order = order }

    /// The largest count.
    package var maximum: UInt64 { order == 6 ? .max : 1 &<< (1 &<< UInt64(order)) &- 1 }

    /// Counts in `byteCount` bytes.
    package func entryCount(inBytes byteCount: Int) -> Int { (byteCount &* 8) &>> Int(order) }

    /// The count at `index`; the caller keeps `index` inside of `bytes`.
    @inline(__always)
    package func count(at index: Int, in bytes: UnsafeRawBufferPointer) -> UInt64 {
        switch order {
        case 0...2:
            let bit = index &<< Int(order)
            let mask: UInt8 = 1 &<< (1 &<< UInt8(order)) &- 1
            return UInt64(bytes[bit &>> 3] &>> UInt8(bit & 7) & mask)
        case 3: return UInt64(bytes[index])
        case 4: return UInt64(bytes.bigEndian(at: index &* 2, as: UInt16.self) ?? 0)
        case 5: return UInt64(bytes.bigEndian(at: index &* 4, as: UInt32.self) ?? 0)
        default: return bytes.bigEndian(at: index &* 8, as: UInt64.self) ?? 0
        }
    }

    /// Stores `count`, which is at most `maximum`, at `index`.
    @inline(__always)
    package func store(_ count: UInt64, at index: Int, in bytes: UnsafeMutableRawBufferPointer) {
        switch order {
        case 0...2:
            let bit = index &<< Int(order)
            let shift = UInt8(bit & 7)
            let mask: UInt8 = 1 &<< (1 &<< UInt8(order)) &- 1
            let rest = bytes[bit &>> 3] & ~(mask &<< shift)
            bytes[bit &>> 3] = rest | (UInt8(truncatingIfNeeded: count) & mask) &<< shift
        case 3: bytes[index] = UInt8(truncatingIfNeeded: count)
        case 4: bytes.storeBigEndian(UInt16(truncatingIfNeeded: count), at: index &* 2)
        case 5: bytes.storeBigEndian(UInt32(truncatingIfNeeded: count), at: index &* 4)
        default: bytes.storeBigEndian(count, at: index &* 8)
        }
    }
}
