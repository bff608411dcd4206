internal import Glibc
internal import QCOW2

extension MountedImage {
    /// Hands `body` the bytes `offset ..< offset + count`, which lie inside the disk, as pieces
    /// that stay as they are until it returns.
    ///
    /// A method, because the image is borrowed here and so neither retained nor released.
    @inline(__always)
    borrowing func withPieces(
        at offset: UInt64, count: Int, _ scratch: Scratch,
        _ body: (UnsafeMutableBufferPointer<iovec>) -> Int32
    ) throws(ImageError) -> Int32 {
        try image.withPieces(
            at: offset, count: count, scratch: scratch.bytes, pieces: scratch.pieces, body)
    }
}
