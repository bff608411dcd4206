/// Holes: what metadata alone proves zero, through the whole chain.
extension Image {
    /// The first offset from `offset` on that may hold data (the next mapped byte); nil where only
    /// holes follow.  Granularity is a cluster, or what a raw backing file's `SEEK_DATA` knows.
    /// - Throws: `.corrupt` where a table cannot be obeyed, `.system` where one cannot be read.
    public func seekData(from offset: UInt64) throws(ImageError) -> UInt64? {
        try walk(from: offset) { !$0 }
    }

    /// The first offset from `offset` on that is in a hole (the next unmapped byte); the end of
    /// the disk counts as one.
    /// - Throws: What `seekData` throws.
    public func seekHole(from offset: UInt64) throws(ImageError) -> UInt64 {
        try walk(from: offset) { $0 } ?? size
    }

    /// The start of the first run from `offset` on that `isWanted`, told whether it is a hole.
    private func walk(
        from offset: UInt64, _ isWanted: (_ isHole: Bool) -> Bool
    ) throws(ImageError) -> UInt64? {
        var offset = offset
        while offset < size {
            let run = try holeOrData(at: offset, limit: size &- offset)
            if isWanted(run.isHole) { return offset }
            offset &+= run.byteCount
        }
        return nil
    }

    /// Whether the bytes from `offset` on are a hole, and for how many of them one look tells.
    func holeOrData(
        at offset: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        let held = ranges.lockShared(offset, 1)
        defer { ranges.unlock(held) }
        return try holeOrDataLocked(at: offset, limit: limit)
    }

    func holeOrDataLocked(
        at offset: UInt64, limit: UInt64, from first: Int = 0
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        let source = try locate(offset, limit: limit, from: first)
        let byteCount = source.extent.byteCount
        switch source.extent.kind {
        case .unallocated, .zeroPlain, .zeroAllocated: return (true, byteCount)
        case .compressed, .corrupt: return (false, byteCount)
        case .data:
            guard layers[source.layer].isRaw else { return (false, byteCount) }
            return try layers[source.layer].rawHoleOrData(at: offset, limit: byteCount)
        }
    }
}

extension Layer {
    /// What the file system knows of a raw disk.
    borrowing func rawHoleOrData(
        at offset: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        do throws(SystemError) {
            return try file.device.holeOrData(at: offset, limit: limit)
        } catch {
            throw ImageError(.system(error, operation: "looking for holes"), file: file.name)
        }
    }
}

extension BlockDevice {
    /// Whether the bytes from `offset` on are a hole, and for how many, at most `limit`.
    func holeOrData(
        at offset: UInt64, limit: UInt64
    ) throws(SystemError) -> (isHole: Bool, byteCount: UInt64) {
        let data = try nextData(from: offset) ?? offset &+ limit
        if data > offset { return (true, min(data &- offset, limit)) }
        let hole = try nextHole(from: offset)
        // Something may have changed in between: then it is data, which is never wrong.
        return (false, hole > offset ? min(hole &- offset, limit) : limit)
    }
}
