internal import CDeflate
internal import CZlib

/// What it takes to inflate raw deflate streams (RFC 1951, no zlib header).
///
/// libdeflate does nearly all of the work.  It cannot stop where the cluster is full, though, and
/// the format allows a stream that goes on: what it rejects is put before zlib, whose verdict is
/// final (and is QEMU's).
struct DeflateContext {
    private let fast: OpaquePointer
    /// zlib's decoder; made when it is first needed.  zlib keeps its address: it never moves.
    private var exact = z_stream()
    private var hasExact = false

    private init(fast: OpaquePointer) { self.fast = fast }

    /// The address of a new context, or nil where there is no memory.
    static func make() -> UnsafeMutableRawPointer? {
        guard let fast = libdeflate_alloc_decompressor() else { return nil }
        let context = UnsafeMutablePointer<DeflateContext>.allocate(capacity: 1)
        context.initialize(to: DeflateContext(fast: fast))
        return UnsafeMutableRawPointer(context)
    }

    static func destroy(_ address: UnsafeMutableRawPointer) {
        let context = address.assumingMemoryBound(to: DeflateContext.self)
        libdeflate_free_decompressor(context.pointee.fast)
        if context.pointee.hasExact { inflateEnd(&context.pointee.exact) }
        context.deinitialize(count: 1)
        context.deallocate()
    }

    /// Fills `cluster` from the first bytes that `stream` inflates to.
    static func inflate(
        _ stream: UnsafeRawBufferPointer, into cluster: UnsafeMutableRawBufferPointer,
        with address: UnsafeMutableRawPointer
    ) throws(DecompressionError) {
        let context = address.assumingMemoryBound(to: DeflateContext.self)
        // Without a place for the length, anything but exactly the cluster's length is an error.
        let result = libdeflate_deflate_decompress(
            context.pointee.fast, stream.baseAddress, stream.count, cluster.baseAddress,
            cluster.count, nil)
        if result == LIBDEFLATE_SUCCESS { return }
        try context.pointee.inflateExactly(stream, into: cluster)
    }

    /// The slow way: zlib stops where the cluster is full.
    ///
    /// All the output lies in front of it, so that distances up to 32 KiB work although the format
    /// has only 4 KiB: QEMU reads them too.
    private mutating func inflateExactly(
        _ stream: UnsafeRawBufferPointer, into cluster: UnsafeMutableRawBufferPointer
    ) throws(DecompressionError) {
        let ready = hasExact ? inflateReset(&exact) : qcowfs_inflate_init(&exact, MAX_WBITS)
        guard ready == Z_OK else { throw .outOfMemory }
        hasExact = true

        // zlib's fields are 32 bits wide; streams and clusters are at most 4 MiB long.
        exact.next_in = UnsafeMutablePointer(
            mutating: stream.baseAddress?.assumingMemoryBound(to: UInt8.self))
        exact.avail_in = UInt32(clamping: stream.count)
        exact.next_out = cluster.baseAddress?.assumingMemoryBound(to: UInt8.self)
        exact.avail_out = UInt32(clamping: cluster.count)
        switch CZlib.inflate(&exact, Z_FINISH) {
        case Z_STREAM_END, Z_BUF_ERROR:
            // A buffer error with a full cluster is a stream with more to give.
            guard exact.avail_out == 0 else {
                throw .short(byteCount: cluster.count - Int(exact.avail_out))
            }
        default: throw .damaged
        }
    }
}
