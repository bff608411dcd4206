internal import CZlib
internal import CZstd

/// The tests' own compressors and decompressors: none of the engine's code is behind them.
package enum Streams {
    /// A raw deflate stream with a window of `1 << windowBits` bytes.
    package static func deflate(
        _ bytes: [UInt8], level: Int32 = 6, windowBits: Int32 = 12
    ) -> [UInt8] {
        var stream = z_stream()
        precondition(qcowfs_deflate_init(&stream, level, windowBits) == Z_OK)
        defer { deflateEnd(&stream) }
        var input = bytes
        var output = [UInt8](repeating: 0, count: bytes.count + bytes.count / 8 + 1024)
        let count = input.withUnsafeMutableBufferPointer { input in
            output.withUnsafeMutableBufferPointer { output in
                stream.next_in = input.baseAddress
                stream.avail_in = UInt32(input.count)
                stream.next_out = output.baseAddress
                stream.avail_out = UInt32(output.count)
                precondition(CZlib.deflate(&stream, Z_FINISH) == Z_STREAM_END)
                return output.count - Int(stream.avail_out)
            }
        }
        return Array(output[..<count])
    }

    package static func zstd(_ bytes: [UInt8], level: Int32 = 3) -> [UInt8] {
        var output = [UInt8](repeating: 0, count: ZSTD_compressBound(bytes.count))
        let count = ZSTD_compress(&output, output.count, bytes, bytes.count, level)
        precondition(ZSTD_isError(count) == 0)
        return Array(output[..<count])
    }

    /// Inflates exactly `output.count` bytes; false where the stream is broken or too short.
    package static func inflate(
        _ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer
    ) -> Bool {
        var stream = z_stream()
        guard qcowfs_inflate_init(&stream, 15) == Z_OK else { return false }
        defer { inflateEnd(&stream) }
        stream.next_in = UnsafeMutablePointer(
            mutating: input.baseAddress?.assumingMemoryBound(to: UInt8.self))
        stream.avail_in = UInt32(input.count)
        stream.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        stream.avail_out = UInt32(output.count)
        let code = CZlib.inflate(&stream, Z_FINISH)
        return stream.avail_out == 0 && (code == Z_STREAM_END || code == Z_BUF_ERROR)
    }

    /// Decompresses exactly `output.count` bytes; false where the stream is broken or too short.
    package static func unzstd(
        _ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer
    ) -> Bool {
        guard let context = ZSTD_createDCtx() else { return false }
        defer { ZSTD_freeDCtx(context) }
        var source = ZSTD_inBuffer(src: input.baseAddress, size: input.count, pos: 0)
        var target = ZSTD_outBuffer(dst: output.baseAddress, size: output.count, pos: 0)
        while target.pos < target.size {
            let before = (source.pos, target.pos)
            let code = ZSTD_decompressStream(context, &target, &source)
            if ZSTD_isError(code) != 0 || before == (source.pos, target.pos) { break }
        }
        return target.pos == target.size
    }
}
