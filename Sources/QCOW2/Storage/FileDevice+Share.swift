/// Space that two files have in common, on file systems that know such a thing.
extension FileDevice {
    /// Makes the bytes at `offset` those of `range` of another file, in the same space on the disk:
    /// what is written to one of them later leaves the other as it is (`FICLONERANGE`).
    ///
    /// Offsets and lengths are multiples of `blockByteCount`.
    /// - Throws: `.notSupported` where these files cannot share them; the bytes are as they were.
    func share(
        _ range: Range<UInt64>, of other: FileDevice, at offset: UInt64
    ) throws(SystemError) {
        try Platform.share(range, of: other.descriptor, with: descriptor, at: offset)
    }

    /// Bytes of the file system's blocks, a power of two; nil for what can share none.
    var blockByteCount: UInt64? {
        guard !isBlockDevice, let count = Platform.blockByteCount(descriptor),
            count > 0, count & (count &- 1) == 0
        else { return nil }
        return count
    }
}
