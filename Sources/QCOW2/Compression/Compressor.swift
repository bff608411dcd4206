/// Compresses clusters as QEMU does, for an image's compression type.
///
/// Any number of threads may use one compressor.  Encoder contexts are reused: once warm, a cluster
/// costs no allocation.
package struct Compressor: ~Copyable, Sendable {
    private let method: Decompressor.Method
    private let effort: CompressionEffort
    private let contexts: ContextPool

    package init(_ method: Decompressor.Method, effort: CompressionEffort = .usual) {
        self.method = method
        self.effort = effort
        switch method {
        case .deflate: contexts = ContextPool(destroying: DeflateEncoder.destroy)
        case .zstd: contexts = ContextPool(destroying: ZstdEncoder.destroy)
        }
    }

    /// Compresses `cluster` to the start of `stream`, which has room for as many bytes, and returns
    /// how many it took; nil where it would not become shorter, or there is no memory for it: then
    /// it is to be stored as it is.
    package borrowing func compress(
        _ cluster: UnsafeRawBufferPointer, into stream: UnsafeMutableRawBufferPointer
    ) -> Int? {
        precondition(stream.count >= cluster.count, "room for a stream")
        guard cluster.count > 1 else { return nil }
        let room = UnsafeMutableRawBufferPointer(rebasing: stream[..<(cluster.count - 1)])
        switch method {
        case .deflate:
            let address = contexts.take() ?? DeflateEncoder.make()
            defer { contexts.give(address) }
            return DeflateEncoder.compress(cluster, into: room, effort: effort, with: address)
        case .zstd:
            guard let address = contexts.take() ?? ZstdEncoder.make() else { return nil }
            defer { contexts.give(address) }
            return ZstdEncoder.compress(cluster, into: room, effort: effort, with: address)
        }
    }
}
