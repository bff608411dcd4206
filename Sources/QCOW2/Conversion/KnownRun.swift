/// The run of a disk that was looked up last.
///
/// Who goes over a disk piece by piece asks for each whether it is a hole.  Some file systems, as
/// tmpfs, look through all pages of a file to find the end of its data: they are asked once a run.
struct KnownRun: Sendable {
    private var range: Range<UInt64> = 0..<0
    private var isHole = false

    /// Whether the bytes of `source` from `offset` on are a hole, and for how many of them that is
    /// known; `offset` is inside of the disk.
    mutating func run(
        of source: SourceDisk, at offset: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        if !range.contains(offset) {
            let found = try source.run(at: offset, limit: source.size &- offset)
            range = offset..<offset &+ found.byteCount
            isHole = found.isHole
        }
        return (isHole, range.upperBound &- offset)
    }
}
