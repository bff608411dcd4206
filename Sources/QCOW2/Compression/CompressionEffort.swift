/// How much time it may take to compress a cluster.
public enum CompressionEffort: Sendable, CaseIterable {
    /// As much as it takes for images no longer than QEMU's (deflate; 1 to 4 % longer with zstd).
    case usual
    /// Less time, for images that are up to 1 % longer (deflate; 1 to 5 % with zstd).
    case low
}
