/// Gives back clusters that hold nothing but zeros.
public enum ZeroReclaim {
    /// Looks for whole clusters of `image` itself, not of its backing files, that are full of
    /// zeros, and discards them.
    ///
    /// - Parameters:
    ///   - image: An image that is open for writing.
    ///   - threadCount: Threads that read, the caller's included.
    ///   - progress: Told what part is done; false cancels, and leaves what is found so far
    ///     discarded.
    /// - Returns: Bytes of the disk whose clusters were given back.
    /// - Throws: what reading and discarding throw; `.cancelled`.
    public static func run(
        on image: Image, threadCount: Int = 2, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) -> UInt64 {
        let freed = Monitor(UInt64(0))
        let cluster = image.clusterByteCount
        let pieceByteCount = max(DiskWalk.pieceByteCount, cluster)
        try DiskWalk(over: [SourceDisk(image)], pieceByteCount: pieceByteCount).run(
            threadCount: threadCount, progress: progress
        ) { piece, buffer throws(ImageError) in
            guard !piece.isHole else { return }
            let bytes = UnsafeMutableRawBufferPointer(
                rebasing: buffer[..<Int(piece.range.upperBound &- piece.range.lowerBound)])
            try image.read(into: bytes, at: piece.range.lowerBound)
            var done = 0
            while done < bytes.count {
                let run = ZeroScan.run(
                    in: UnsafeRawBufferPointer(bytes), from: done, at: piece.range.lowerBound,
                    unitByteCount: cluster)
                let start = piece.range.lowerBound &+ UInt64(done)
                if run.isZero {
                    let end = piece.range.lowerBound &+ UInt64(run.end)
                    let count = try image.discardOwnZeros(start..<end)
                    freed.withLock { $0 &+= count }
                }
                done = run.end
            }
        }
        return freed.withLock { $0 }
    }
}

extension Image {
    /// Discards those whole clusters of `range` that the image itself has and that hold nothing
    /// but zeros.  Returns the bytes of the disk that they are.
    ///
    /// Somebody may write meanwhile: whether a cluster is zero is decided under its lock.
    func discardOwnZeros(_ range: Range<UInt64>) throws(ImageError) -> UInt64 {
        let writing = try writer()
        try begin(writing)
        var freed: UInt64 = 0
        var offset = (range.lowerBound &+ map.clusterMask) & ~map.clusterMask
        while offset < range.upperBound {
            let end = min(offset &+ map.clusterMask &+ 1, size)
            guard end <= range.upperBound else { break }
            try writing.commit.relieve()
            if try discardOwnZeroCluster(offset..<end, writing) { freed &+= end &- offset }
            offset = end
        }
        return freed
    }

    private func discardOwnZeroCluster(
        _ range: Range<UInt64>, _ writing: Writing
    ) throws(ImageError) -> Bool {
        let held = ranges.lockExclusive(range.lowerBound, range.upperBound &- range.lowerBound)
        defer { ranges.unlock(held) }
        guard try holdsData(clusterAt: range.lowerBound) else { return false }
        // Version 2 cannot hide a backing file: the zeros are needed.
        if map.version == 2, range.lowerBound < backingEnd { return false }
        let isZero = try writing.scratch.withBuffer { scratch throws(ImageError) in
            var offset = range.lowerBound
            while offset < range.upperBound {
                let count = min(range.upperBound &- offset, UInt64(scratch.count))
                let part = UnsafeMutableRawBufferPointer(rebasing: scratch[..<Int(count)])
                try readLocked(into: part, at: offset)
                guard ZeroScan.isZero(UnsafeRawBufferPointer(part)) else { return false }
                offset &+= count
            }
            return true
        }
        if isZero { try zeroClusters(range, .unmapping, writing) }
        return isZero
    }

    /// Whether the image itself stores bytes of the cluster.
    private func holdsData(clusterAt offset: UInt64) throws(ImageError) -> Bool {
        if map.isExtended {
            let entry = try map.entry(of: offset &>> map.clusterBits)
            return entry.isCompressed || entry.subclusters.allocated != 0
        }
        let kind = try map.extent(at: offset, limit: 1).kind
        return kind == .data || kind == .compressed
    }
}
