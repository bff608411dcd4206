internal import CZstd

/// Makes zstd frames, one a cluster.
enum ZstdEncoder {
    /// The usual one is one below the library's, which is QEMU's: for clusters it takes three
    /// quarters of the time, and the frames are less than a hundredth longer.
    private static func level(_ effort: CompressionEffort) -> Int32 {
        switch effort {
        case .usual: 2
        case .low: 1
        }
    }

    /// The address of a new context, or nil where there is no memory.
    static func make() -> UnsafeMutableRawPointer? {
        ZSTD_createCCtx().map { UnsafeMutableRawPointer($0) }
    }

    static func destroy(_ address: UnsafeMutableRawPointer) {
        ZSTD_freeCCtx(OpaquePointer(address))
    }

    /// How many bytes of `room` the frame took; nil where it does not fit.
    static func compress(
        _ cluster: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer,
        effort: CompressionEffort, with address: UnsafeMutableRawPointer
    ) -> Int? {
        let byteCount = ZSTD_compressCCtx(
            OpaquePointer(address), room.baseAddress, room.count, cluster.baseAddress,
            cluster.count, level(effort))
        return ZSTD_isError(byteCount) == 0 ? byteCount : nil
    }
}
