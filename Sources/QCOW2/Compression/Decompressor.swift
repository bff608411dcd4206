/// Inflates the compressed clusters of one image.
///
/// Any number of threads may use one decompressor.  Decoder contexts are reused: once warm,
/// a cluster costs no allocation.
package struct Decompressor: ~Copyable, Sendable {
    /// The compression type of an image, by the number its header has for it.
    package enum Method: UInt8, Sendable {
        case deflate = 0
        case zstd = 1
    }

    package let method: Method
    private let contexts: ContextPool
    private let buffers: StreamBuffers

    package init(_ method: Method) {
        self.method = method
        buffers = StreamBuffers()
        switch method {
        case .deflate: contexts = ContextPool(destroying: DeflateContext.destroy)
        case .zstd: contexts = ContextPool(destroying: ZstdContext.destroy)
        }
    }

    /// Inflates `stream`, which may go on with anything after its end, to exactly the bytes of
    /// `cluster`.  When it throws, what `cluster` holds is undefined.
    package borrowing func decompress(
        _ stream: UnsafeRawBufferPointer, into cluster: UnsafeMutableRawBufferPointer
    ) throws(DecompressionError) {
        guard !cluster.isEmpty else { return }
        guard !stream.isEmpty else { throw .short(byteCount: 0) }
        switch method {
        case .deflate:
            guard let address = contexts.take() ?? DeflateContext.make() else { throw .outOfMemory }
            defer { contexts.give(address) }
            try DeflateContext.inflate(stream, into: cluster, with: address)
        case .zstd:
            guard let address = contexts.take() ?? ZstdContext.make() else { throw .outOfMemory }
            defer { contexts.give(address) }
            try ZstdContext.inflate(stream, into: cluster, with: address)
        }
    }

    /// Calls `body` with a buffer of `byteCount` bytes to read a stream into; what it holds at
    /// first is undefined.
    package borrowing func withStreamBuffer<Result, Failure>(
        byteCount: Int, _ body: (UnsafeMutableRawBufferPointer) throws(Failure) -> Result
    ) throws(Failure) -> Result {
        let buffer = buffers.take(byteCount: byteCount)
        defer { buffers.give(buffer) }
        return try body(UnsafeMutableRawBufferPointer(rebasing: buffer[..<byteCount]))
    }
}

/// Buffers for streams on their way from the file to the decoder, reused.
private struct StreamBuffers: ~Copyable, Sendable {
    /// Room for any stream of clusters up to 64 KiB.  Longer ones get a buffer of their own for
    /// the time of their use: sixteen idle buffers of 4 MiB would be too much to keep.
    static var pooledByteCount: Int { 128 << 10 }

    private let idle = ContextPool(destroying: { $0.deallocate() })

    borrowing func take(byteCount: Int) -> UnsafeMutableRawBufferPointer {
        guard byteCount <= Self.pooledByteCount else {
            return .allocate(byteCount: byteCount, alignment: 4096)
        }
        let address = idle.take() ?? .allocate(byteCount: Self.pooledByteCount, alignment: 4096)
        return UnsafeMutableRawBufferPointer(start: address, count: Self.pooledByteCount)
    }

    borrowing func give(_ buffer: UnsafeMutableRawBufferPointer) {
        guard let address = buffer.baseAddress else { return }
        if buffer.count == Self.pooledByteCount { idle.give(address) } else { buffer.deallocate() }
    }
}
