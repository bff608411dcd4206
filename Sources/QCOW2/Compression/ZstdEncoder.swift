internal import CZstd

/// Makes zstd frames, one a cluster.
///
/// Level 2 of the library, one below QEMU's, searches in one hash table.  For clusters of 64 KiB
/// ours is half as large as the library's, with low effort a quarter: it stays in the processor's
/// cache, which takes less time for next to the same length.
enum ZstdEncoder {
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
        let context = OpaquePointer(address)
        let tableBits = tableBits(clusterByteCount: cluster.count, effort)
        // All of them are in range: none can be refused.
        ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, 2)
        ZSTD_CCtx_setParameter(context, ZSTD_c_hashLog, tableBits)
        ZSTD_CCtx_setParameter(context, ZSTD_c_minMatch, 5)
        let byteCount = ZSTD_compress2(
            context, room.baseAddress, room.count, cluster.baseAddress, cluster.count)
        return ZSTD_isError(byteCount) == 0 ? byteCount : nil
    }

    /// The binary logarithm of the hash table's entries.
    private static func tableBits(clusterByteCount: Int, _ effort: CompressionEffort) -> Int32 {
        let clusterBits = Int32(Int.bitWidth - 1 - clusterByteCount.leadingZeroBitCount)
        let usual = max(14, clusterBits - 5)
        return effort == .usual ? usual : usual - 1
    }
}
