/// A device that is longer than the one below it, and reads as zeros from that one's end on.
///
/// For who needs a whole number of some unit: a disk of whole sectors from a file of any length,
/// two disks of one size to compare.  Its length is fixed, unless the device below gets longer.
public final class PaddedDevice: BlockDevice {
    private let base: any BlockDevice
    private let leastByteCount: UInt64

    /// - Parameters:
    ///   - base: The device below.
    ///   - byteCount: Bytes that there are at least.
    public init(_ base: any BlockDevice, byteCount: UInt64) {
        self.base = base
        leastByteCount = byteCount
    }

    /// What the device below is called.
    public var name: String { base.name }

    /// The length in bytes: the one wanted, or the length of the device below where that is longer.
    /// - Throws: What the device below throws.
    public func byteCount() throws(SystemError) -> UInt64 {
        max(try base.byteCount(), leastByteCount)
    }

    /// Reads from the device below, and zeros behind its end.
    /// - Throws: What the device below throws.
    public func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        let end = try byteCount()
        guard offset < end else { return 0 }
        let count = Int(min(UInt64(buffer.count), end - offset))
        try base.readPadded(
            into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]), at: offset)
        return count
    }

    /// Writes to the device below, which grows where it can.
    /// - Throws: What the device below throws.
    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        try base.write(bytes, at: offset)
    }

    /// Flushes the device below.
    /// - Throws: What the device below throws.
    public func flush() throws(SystemError) { try base.flush() }

    /// - Throws: `.notSupported`.
    public func resize(to byteCount: UInt64) throws(SystemError) { throw .notSupported }

    /// Gives space of the device below back.
    /// - Throws: What the device below throws.
    public func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        let part = range.clamped(to: 0..<(try base.byteCount()))
        if !part.isEmpty { try base.punchHole(part) }
    }

    /// The first offset from `offset` on that may hold data; the padding holds none.
    /// - Throws: What the device below throws.
    public func nextData(from offset: UInt64) throws(SystemError) -> UInt64? {
        try base.nextData(from: offset)
    }

    /// The first offset from `offset` on that is in a hole; the padding is one.
    /// - Throws: What the device below throws.
    public func nextHole(from offset: UInt64) throws(SystemError) -> UInt64 {
        offset < (try base.byteCount()) ? try base.nextHole(from: offset) : offset
    }

    /// Closes the device below.
    public func close() { base.close() }
}
