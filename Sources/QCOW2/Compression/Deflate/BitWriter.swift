/// Writes a stream's bits, the lowest of a byte first (RFC 1951, section 3.1.1).
///
/// The caller has made sure that what it writes fits.
struct BitWriter {
    private let start: UnsafeMutableRawPointer
    private let end: UnsafeMutableRawPointer
    private var next: UnsafeMutableRawPointer
    private var bits: UInt64 = 0
    /// How many of `bits` are meant; at most 7 after `flush`.
    private var count: UInt64 = 0

    init(_ room: UnsafeMutableRawBufferPointer) {
        start = room.baseAddress.unsafelyUnwrapped
        end = start + room.count
        next = start
    }

    /// How many bits still have a place.
    var bitsLeft: Int { (end - next) &* 8 &- Int(truncatingIfNeeded: count) }

    /// How many whole bytes were stored.
    var byteCount: Int { next - start }

    /// Adds `count` bits, all above them 0; at most 56 between two flushes.
    @inline(__always)
    mutating func add(_ value: UInt64, _ count: UInt64) {
        bits |= value &<< self.count
        self.count &+= count
    }

    /// Stores the whole bytes.
    @inline(__always)
    mutating func flush() {
        guard end - next >= 8 else { return flushBytes() }
        next.storeBytes(of: bits.littleEndian, as: UInt64.self)
        next += Int(truncatingIfNeeded: count &>> 3)
        bits &>>= count & ~7
        count &= 7
    }

    @inline(never)
    private mutating func flushBytes() {
        while count >= 8 {
            next.storeBytes(of: UInt8(truncatingIfNeeded: bits), as: UInt8.self)
            next += 1
            bits &>>= 8
            count &-= 8
        }
    }

    /// Fills the last byte with zeros.
    mutating func alignToByte() {
        count = (count &+ 7) & ~7
        flush()
    }

    /// Adds whole bytes, at a byte's start.
    mutating func append(_ bytes: UnsafeRawBufferPointer) {
        next.copyMemory(from: bytes.baseAddress.unsafelyUnwrapped, byteCount: bytes.count)
        next += bytes.count
    }
}
