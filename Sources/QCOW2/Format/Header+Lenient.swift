extension Header {
    /// What is left of a header that breaks the format's rules: each part as far as it can be read,
    /// sizes cut down to their limits.  Nil where not even the cluster size makes sense.
    package static func lenient(_ bytes: UnsafeRawBufferPointer) -> Header? {
        guard bytes.bigEndian(at: 0, as: UInt32.self) == magic, bytes.count >= Int(byteCountV2)
        else { return nil }
        var header = Header(fixedPart: bytes)
        guard header.version == 2 || header.version == 3,
            Limits.clusterBits.contains(header.clusterBits)
        else { return nil }
        if header.version == 3 {
            header.byteCount = writtenByteCountV3
            header.keepingWhatParses { header throws(FormatError) in
                try header.parseVersion3Fields(bytes)
            }
        }
        header.keepingWhatParses { header throws(FormatError) in
            try header.parseExtensions(bytes)
        }
        header.cutDown()
        return header
    }

    /// A part that throws leaves the header as it was.
    private mutating func keepingWhatParses(
        _ body: (inout Header) throws(FormatError) -> Void
    ) {
        var parsed = self
        do throws(FormatError) {
            try body(&parsed)
            self = parsed
        } catch {}
    }

    private mutating func cutDown() {
        size = min(size, Limits.virtualByteCount)
        l1EntryCount = min(l1EntryCount, UInt32(Limits.l1ByteCount / 8))
        if l1Offset >= Limits.hostOffset { l1EntryCount = 0 }
        let most = Limits.refcountTableByteCount / clusterByteCount
        refcountTableClusterCount = min(refcountTableClusterCount, UInt32(most))
        if refcountTableOffset >= Limits.hostOffset { refcountTableClusterCount = 0 }
        snapshotCount = min(snapshotCount, UInt32(Limits.snapshotCount))
        if snapshotsOffset >= Limits.hostOffset { snapshotCount = 0 }
        if backingFileOffset > clusterByteCount
            || UInt64(backingFileByteCount) > clusterByteCount - backingFileOffset
        {
            backingFileOffset = 0
            backingFileByteCount = 0
        }
    }
}
