internal import CZlib

/// Makes raw deflate streams whose distances stay within the 4 KiB that the format allows: zlib,
/// because libdeflate's window cannot be made smaller.
enum DeflateEncoder {
    private static var windowBits: Int32 { 12 }

    /// The address of a new context, or nil where there is no memory.
    static func make() -> UnsafeMutableRawPointer? {
        let context = UnsafeMutablePointer<z_stream>.allocate(capacity: 1)
        context.initialize(to: z_stream())
        guard qcowfs_deflate_init(context, Z_DEFAULT_COMPRESSION, windowBits) == Z_OK else {
            context.deallocate()
            return nil
        }
        return UnsafeMutableRawPointer(context)
    }

    static func destroy(_ address: UnsafeMutableRawPointer) {
        let context = address.assumingMemoryBound(to: z_stream.self)
        deflateEnd(context)
        context.deallocate()
    }

    /// How many bytes of `room` the stream took; nil where it does not fit.
    static func compress(
        _ cluster: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer,
        with address: UnsafeMutableRawPointer
    ) -> Int? {
        let context = address.assumingMemoryBound(to: z_stream.self)
        guard deflateReset(context) == Z_OK else { return nil }
        // zlib's fields are 32 bits wide; clusters are at most 2 MiB long.
        context.pointee.next_in = UnsafeMutablePointer(
            mutating: cluster.baseAddress?.assumingMemoryBound(to: UInt8.self))
        context.pointee.avail_in = UInt32(clamping: cluster.count)
        context.pointee.next_out = room.baseAddress?.assumingMemoryBound(to: UInt8.self)
        context.pointee.avail_out = UInt32(clamping: room.count)
        guard deflate(context, Z_FINISH) == Z_STREAM_END else { return nil }
        return room.count - Int(context.pointee.avail_out)
    }
}
