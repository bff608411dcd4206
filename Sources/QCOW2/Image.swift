package import Glibc

/// The virtual disk of a qcow2 image: guest bytes, over the layers of its backing chain.
///
/// Any method may be called from any thread.
public final class Image: Sendable {
    /// What lies below an image that was opened on a device instead of a path.
    public enum Backing: Sendable {
        case qcow2(any BlockDevice)
        case raw(any BlockDevice)
    }

    public static func open(_ path: String, options: OpenOptions = OpenOptions()) throws(ImageError) -> Image { fatalError() }
    public static func open(_ device: any BlockDevice, backing: [Backing] = [], options: OpenOptions = OpenOptions()) throws(ImageError) -> Image { fatalError() }

    /// Bytes of the virtual disk: the header's size rounded down to a multiple of 512.
    public var size: UInt64 { fatalError() }
    public var isReadOnly: Bool { fatalError() }
    /// Bytes of a cluster of the top layer.
    public var clusterByteCount: UInt64 { fatalError() }

    public func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(ImageError) { fatalError() }
    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) { fatalError() }
    public func flush() throws(ImageError) { fatalError() }
    public func discard(_ range: Range<UInt64>) throws(ImageError) { fatalError() }
    /// Makes `range` read as zeros; `keepingSpace` keeps clusters that are allocated.
    public func writeZeroes(_ range: Range<UInt64>, keepingSpace: Bool = false) throws(ImageError) { fatalError() }
    /// Allocates every cluster of `range` that has none, keeping what it reads (fallocate mode 0).
    public func allocate(_ range: Range<UInt64>) throws(ImageError) { fatalError() }
    /// First offset from `offset` on that is not proven zero by metadata; nil where only holes follow.
    public func seekData(from offset: UInt64) throws(ImageError) -> UInt64? { fatalError() }
    /// First offset from `offset` on that is in a hole; the end of the disk counts as one.
    public func seekHole(from offset: UInt64) throws(ImageError) -> UInt64 { fatalError() }
    /// Sets the size (bytes, a multiple of 512); new bytes read as zeros.
    public func resize(to byteCount: UInt64, shrinking: Bool = false) throws(ImageError) { fatalError() }
    /// Writes everything, unlocks, closes.  Errors are those of the last writes.  Idempotent.
    public func close() throws(ImageError) { fatalError() }

    /// Starts a thread that commits metadata every `interval`; it ends with `close()`.
    public func startCommitting(every interval: Duration) { fatalError() }
    /// Starts a thread that counts allocated guest bytes once; it ends with `close()`.
    public func startCountingAllocation() { fatalError() }
    /// Guest bytes allocated in the chain; before the count is done, an estimate below `size`.
    public var allocatedByteCount: UInt64 { fatalError() }

    /// Reads guest bytes `offset ..< offset + count` (inside the disk) as pieces for one gathering
    /// reply.  Plain data of `mapThreshold` bytes and more comes from the files' mappings, zeros
    /// from a static zero area, the rest is read or inflated into `scratch` (at least `count`
    /// bytes).  The guest range stays locked until `body` returns: nothing in it is freed or moved.
    package func withPieces<Result>(
        at offset: UInt64, count: Int, scratch: UnsafeMutableRawBufferPointer,
        pieces: UnsafeMutableBufferPointer<iovec>,
        _ body: (UnsafeMutableBufferPointer<iovec>) -> Result
    ) throws(ImageError) -> Result { fatalError() }
}
