/// What an external data file asks for beyond entries: its own zeros, and a length.
extension Image {
    /// Zeroes clusters with data of a raw data file, which alone must read as the disk does.  Their
    /// entries go on showing it, so that neither file has to wait for the other.
    func zeroRawDataFile(_ run: Range<UInt64>, _ zeroing: Zeroing) throws(ImageError) {
        let bytes = run.clamped(to: 0..<size)
        switch zeroing {
        case .unmapping: try top.unmap(bytes)
        case .keeping: try top.writeZeroes(bytes)
        }
    }

    /// Gives back the space of clusters that read as zeros by now.  This happens under the range
    /// lock of the discard: later, somebody might have written there again.
    func unmapDataFile(_ run: Range<UInt64>, _ kind: ClusterKind) {
        guard kind == .data || kind == .zeroAllocated else { return }
        let bytes = run.clamped(to: 0..<size)
        // Less than a page of the file system: it would be zeroed, not given back.
        if bytes.count >= 4096 { top.data.punchHole(bytes) }
    }

    /// Makes the data file as long as the disk will be; its new bytes read as zeros.
    func growDataFile(from old: UInt64, to new: UInt64) throws(ImageError) {
        guard map.hasDataFile else { return }
        let data = top.data
        if data.readsZerosPastEnd {
            // Whatever lies behind the disk goes first.
            try data.resize(to: old)
            try data.resize(to: new)
            // Zeros of the file are no zeros of an encrypted disk.
            if header.hasRawDataFile, top.isEncrypted { try top.writeZeroes(old..<new) }
        } else if data.writtenEnd < new {
            throw ImageError(.system(.noSpace, operation: "cannot hold the disk"), file: data.name)
        } else if header.hasRawDataFile {
            try top.writeZeroes(old..<new)
        }
    }

    /// Gives the clusters of a grown disk their places in a raw data file, as QEMU does, so that no
    /// table says less than the file; afterwards the file ends with the disk.
    func mapRawDataFile(_ range: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        guard map.hasDataFile else { return }
        var offset = range.lowerBound & ~map.clusterMask
        while offset < range.upperBound, header.hasRawDataFile {
            let end = min(ranges.groupEnd(of: offset), range.upperBound)
            try writing.commit.relieve()
            try mapGroup(offset..<end, writing)
            offset = end
        }
        if top.data.readsZerosPastEnd { try top.data.resize(to: range.upperBound) }
    }

    private func mapGroup(_ range: Range<UInt64>, _ writing: Writing) throws(ImageError) {
        let held = ranges.lockExclusive(range.lowerBound, range.upperBound &- range.lowerBound)
        defer { ranges.unlock(held) }
        var offset = range.lowerBound
        while offset < range.upperBound {
            let tableEnd = (offset &>> map.coverageBits &+ 1) &<< map.coverageBits
            let part = offset..<min(range.upperBound, tableEnd)
            let first = offset &>> map.clusterBits
            try change(part, writing) { index, old in
                guard old.offset == 0, !old.showsData else { return old }
                let host = (first &+ UInt64(index)) &<< map.clusterBits
                return L2Entry(bits: host | L2Entry.copied, subclusters: old.subclusters)
            }
            offset = part.upperBound
        }
    }

    /// Cuts the data file where the disk ends.
    func cutDataFile(to byteCount: UInt64) throws(ImageError) {
        guard map.hasDataFile, top.data.readsZerosPastEnd, top.data.writtenEnd > byteCount else {
            return
        }
        try top.data.resize(to: byteCount)
    }
}
