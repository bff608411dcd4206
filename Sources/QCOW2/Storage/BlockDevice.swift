/// Bytes at offsets: what an image, a backing file or a copy's target lies on.
///
/// Any method may be called from any thread, several at once.  Offsets and counts are bytes.
/// Everything a method throws is what the operating system said.
public protocol BlockDevice: AnyObject, Sendable {
    /// The length in bytes.
    /// - Throws: What the system said.
    func byteCount() throws(SystemError) -> UInt64

    /// Fills `buffer` from `offset` on and returns how many bytes there were:
    /// fewer than asked only where the device ends.
    /// - Throws: What the system said.
    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(SystemError)
        -> Int

    /// Writes all of `bytes` at `offset`; a device that can grow grows.
    /// - Throws: What the system said; some of the bytes may have been written.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError)

    /// Returns when everything whose `write` returned before is on stable storage (`fdatasync`).
    /// - Throws: What the system said; what was written before may be lost then.
    func flush() throws(SystemError)

    /// Sets the length; new bytes read as zeros.
    /// - Throws: What the system said: `.noSpace`, or `.notSupported` for a length that is fixed.
    func resize(to byteCount: UInt64) throws(SystemError)

    /// Gives the space of `range` back; it reads as zeros afterwards (`FALLOC_FL_PUNCH_HOLE`).
    /// Throws `.notSupported` where this device cannot, and has then changed nothing.
    func punchHole(_ range: Range<UInt64>) throws(SystemError)

    /// Reserves space for `range`, growing the device where needed; what was written stays, new
    /// bytes read as zeros (`fallocate`).  Throws `.notSupported` where this device cannot.
    func reserve(_ range: Range<UInt64>) throws(SystemError)

    /// The first offset from `offset` on that may hold data, nil when only holes follow
    /// (`SEEK_DATA`).  A device that does not know says `offset`.
    /// - Throws: What the system said.
    func nextData(from offset: UInt64) throws(SystemError) -> UInt64?

    /// The first offset from `offset` on that is in a hole; the device's end counts as one
    /// (`SEEK_HOLE`).
    /// - Throws: What the system said.
    func nextHole(from offset: UInt64) throws(SystemError) -> UInt64

    /// Whether bytes at or past the length, once written over by a longer neighbour, read as zeros:
    /// true of a regular file, false of a block device or of RAM that was used before.
    var readsZerosPastEnd: Bool { get }

    /// A read-only, shared mapping of the device's bytes from offset 0 on, coherent with `write`,
    /// or nil.  It may be longer than the device: whoever uses it stays below `byteCount`, and
    /// only hands addresses to the kernel, which answers EFAULT where a file was cut short.
    var mappedBytes: UnsafeRawBufferPointer? { get }

    /// What a message calls this device: a path, mostly.
    var name: String { get }

    /// Gives up what the device holds, locks included; nothing is asked of it afterwards.
    func close()
}

extension BlockDevice {
    public var readsZerosPastEnd: Bool { false }
    public func close() {}
    public var mappedBytes: UnsafeRawBufferPointer? { nil }
    public func punchHole(_ range: Range<UInt64>) throws(SystemError) { throw .notSupported }
    public func reserve(_ range: Range<UInt64>) throws(SystemError) { throw .notSupported }
    /// - Throws: What `byteCount` throws.
    public func nextData(from offset: UInt64) throws(SystemError) -> UInt64? {
        offset < (try byteCount()) ? offset : nil
    }
    /// - Throws: What `byteCount` throws.
    public func nextHole(from offset: UInt64) throws(SystemError) -> UInt64 { try byteCount() }

    /// Fills `buffer` from `offset` on, with zeros where the device has ended.
    package func readPadded(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) {
        let count = try read(into: buffer, at: offset)
        if count < buffer.count {
            UnsafeMutableRawBufferPointer(rebasing: buffer[count...]).initializeMemory(
                as: UInt8.self, repeating: 0)
        }
    }
}
