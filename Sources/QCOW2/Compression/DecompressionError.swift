/// Why a compressed cluster could not be inflated.
package enum DecompressionError: Error, Equatable, Sendable, CustomStringConvertible {
    /// The bytes are no stream of the image's compression type, or the stream is cut short.
    case damaged
    /// The stream ended after `byteCount` bytes, before the cluster was full.
    case short(byteCount: Int)
    /// A zstd frame goes on past the end of the cluster.
    case long
    /// A zstd frame asks for more history than a decoder has to keep, 128 MiB.
    case windowTooLarge(byteCount: UInt64)
    /// No memory for a decoder.
    case outOfMemory

    package var description: String {
        switch self {
        case .damaged: "the compressed data is damaged or cut short"
        case .short(let byteCount):
            "the compressed data ends after \(byteCount) bytes of the cluster"
        case .long: "the compressed data is longer than the cluster"
        case .windowTooLarge(let byteCount):
            "the compressed data wants a window of \(byteCount) bytes (134217728 are allowed)"
        case .outOfMemory: "no memory to decompress"
        }
    }
}
