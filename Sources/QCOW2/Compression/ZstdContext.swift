internal import CZstd

/// What it takes to inflate zstd streams: one or more frames, skippable ones among them.
///
/// Frames are found one by one and decoded straight into the cluster.  A streaming decoder would
/// need a buffer of its own as large as the window that the frame asks for, up to 128 MiB.
enum ZstdContext {
    /// What a decoder keeps at most, by default and in QEMU.
    private static var windowByteCountLimit: UInt64 { 1 << 27 }
    private static var frameMagic: UInt32 { 0xfd2f_b528 }
    /// The last four bits of a skippable frame's magic number are free.
    private static var skippableMagic: UInt32 { 0x184d_2a50 }

    /// The address of a new context, or nil where there is no memory.
    static func make() -> UnsafeMutableRawPointer? {
        ZSTD_createDCtx().map { UnsafeMutableRawPointer($0) }
    }

    static func destroy(_ address: UnsafeMutableRawPointer) {
        ZSTD_freeDCtx(OpaquePointer(address))
    }

    /// Fills `cluster` from as many whole frames as it takes; what follows them is not looked at.
    static func inflate(
        _ stream: UnsafeRawBufferPointer, into cluster: UnsafeMutableRawBufferPointer,
        with address: UnsafeMutableRawPointer
    ) throws(DecompressionError) {
        var rest = stream[...]
        var done = 0
        while done < cluster.count {
            let source = UnsafeRawBufferPointer(rebasing: rest)
            guard let isSkippable = try judgeFrame(source) else {
                throw done > 0 ? .short(byteCount: done) : .damaged
            }
            let byteCount = ZSTD_findFrameCompressedSize(source.baseAddress, source.count)
            guard ZSTD_isError(byteCount) == 0, byteCount > 0, byteCount <= source.count else {
                throw .damaged
            }
            if !isSkippable {
                let target = UnsafeMutableRawBufferPointer(rebasing: cluster[done...])
                let produced = ZSTD_decompressDCtx(
                    OpaquePointer(address), target.baseAddress, target.count, source.baseAddress,
                    byteCount)
                guard ZSTD_isError(produced) == 0, produced <= target.count else {
                    throw ZSTD_getErrorCode(produced) == ZSTD_error_dstSize_tooSmall
                        ? .long : .damaged
                }
                done += produced
            }
            rest = rest.dropFirst(byteCount)
        }
    }

    /// Whether a frame to skip begins here, nil where no frame does.
    private static func judgeFrame(
        _ source: UnsafeRawBufferPointer
    ) throws(DecompressionError) -> Bool? {
        // The shortest frame has magic number, descriptor, window or content size, a block header.
        guard source.count >= 8 else { return nil }
        let magic = UInt32(littleEndian: source.loadUnaligned(as: UInt32.self))
        if magic & 0xffff_fff0 == skippableMagic { return true }
        guard magic == frameMagic else { return nil }
        let isSingleSegment = source[4] & 0x20 != 0
        if !isSingleSegment {
            // Window descriptor: 5 bits of exponent, 3 of mantissa (RFC 8878, 3.1.1.1.2).
            let base = UInt64(1) << (10 + UInt64(source[5] >> 3))
            let window = base + base / 8 * UInt64(source[5] & 7)
            guard window <= windowByteCountLimit else { throw .windowTooLarge(byteCount: window) }
        }
        return false
    }
}
