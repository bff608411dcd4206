/// Writing: in place where the cluster is ours alone; otherwise into a new cluster, whose entry is
/// linked when the data has returned.
extension Image {
    /// Writes `bytes` at `offset`.  They are read back from here on, and durable after `flush`.
    /// - Throws: `.readOnly`; `.invalidArgument` outside of the disk; `.corrupt` where an entry
    ///   makes no sense, after which the image takes no writes; `.system` for what the device said
    ///   (ENOSPC leaves everything as it was).
    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
        guard writing != nil else { throw notWritable }
        try checkRange(offset, UInt64(bytes.count))
        try writing?.write(bytes, at: offset, self)
    }

    /// Writes `bytes` at `offset`, likewise.
    /// - Throws: What `write` throws for a buffer.
    public func write(_ bytes: [UInt8], at offset: UInt64) throws(ImageError) {
        let result = bytes.withUnsafeBytes { buffer in
            Result { () throws(ImageError) in try write(buffer, at: offset) }
        }
        try result.get()
    }

    /// Writes bytes of one group, under its exclusive lock.
    func writeLocked(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64, _ writing: Writing
    ) throws(ImageError) {
        var done = 0
        while done < bytes.count {
            let guest = offset &+ UInt64(done)
            let rest = UnsafeRawBufferPointer(rebasing: bytes[done...])
            let extent = try extentToChange(at: guest, limit: UInt64(rest.count), writing)
            switch (extent.kind, extent.isCopied) {
            case (.data, true):
                let part = UnsafeRawBufferPointer(rebasing: rest[..<Int(extent.byteCount)])
                try writing.write(part, at: guest, extent, self)
                done += part.count
            case (.zeroAllocated, true),
                (.unallocated, true) where extent.hasCluster:
                done += try writeExposing(rest, at: guest, extent, writing)
            default:
                done += try writeAllocating(rest, at: guest, extent, writing)
            }
        }
    }

    // MARK: New clusters

    /// Writes the start of `bytes` to new clusters and links them; returns how many bytes.
    private func writeAllocating(
        _ bytes: UnsafeRawBufferPointer, at guest: UInt64, _ extent: Extent, _ writing: Writing
    ) throws(ImageError) -> Int {
        try makeTableWritable(at: guest, writing)
        let first = guest &>> map.clusterBits
        let tableEnd = (guest &>> map.coverageBits &+ 1) &<< map.coverageBits
        let end = min(guest &+ min(extent.byteCount, UInt64(bytes.count)), tableEnd)
        let wanted = Int(truncatingIfNeeded: (end &- 1) &>> map.clusterBits &- first &+ 1)
        let run = try allocate(forGuest: first, wanted, writing)
        let linkedEnd = min(end, (first &+ run.count) &<< map.clusterBits)
        let part = UnsafeRawBufferPointer(rebasing: bytes[..<Int(linkedEnd &- guest)])
        let host = run.first &<< map.clusterBits
        let range: Range<UInt64>
        do throws(ImageError) {
            range = try rangeToWrite(guest..<linkedEnd, extent, writing)
            try writeFilled(
                part, at: guest, range, to: host &+ range.lowerBound & map.clusterMask, writing)
            if extent.hasCluster, map.isExtended {
                try copyAllocated(outside: range, to: host, writing)
            }
        } catch {
            try release(run, writing)
            throw error
        }
        try linkData(range, at: host, writing)
        return part.count
    }

    /// Shows the data of guest bytes `range`, whole subclusters, in clusters from `host` on.
    func linkData(
        _ range: Range<UInt64>, at host: UInt64, _ writing: Writing
    ) throws(ImageError) {
        let first = range.lowerBound &>> map.clusterBits
        let count = (range.upperBound &- 1) &>> map.clusterBits &- first &+ 1
        try link(first, count: Int(count), writing) { index, old in
            let offset = host &+ UInt64(index) &<< map.clusterBits
            guard map.isExtended else { return L2Entry(copiedClusterAt: offset) }
            let written = map.subclusters(of: range, inCluster: first &+ UInt64(index))
            return old.showing(written, inClusterAt: offset)
        }
    }

    /// Writes `bytes` for guest offset `guest`, and around them what the disk reads there now, to
    /// the host bytes from `host` on that stand for guest bytes `range`.
    private func writeFilled(
        _ bytes: UnsafeRawBufferPointer, at guest: UInt64, _ range: Range<UInt64>, to host: UInt64,
        _ writing: Writing
    ) throws(ImageError) {
        let start = range.lowerBound
        let head = Int(guest &- start)
        let end = guest &+ UInt64(bytes.count)
        // A data file ends with the disk, which need not end with a cluster.
        let rangeEnd = map.hasDataFile ? max(min(range.upperBound, size), end) : range.upperBound
        let tail = Int(rangeEnd &- end)
        if head + tail == 0 { return try top.write(bytes, at: host) }
        if top.isUntouched(from: host), try readsZeroAround(start, guest, end, UInt64(tail)) {
            return try top.write(bytes, at: host &+ UInt64(head))
        }
        let behind = host &+ UInt64(head + bytes.count)
        if try copyMapped(start, count: head, to: host),
            try copyMapped(end, count: tail, to: behind)
        {
            return try top.write(bytes, at: host &+ UInt64(head))
        }
        try writing.scratch.withBuffer { scratch throws(ImageError) in
            if head + bytes.count + tail <= scratch.count {
                let whole = UnsafeMutableRawBufferPointer(
                    rebasing: scratch[..<(head + bytes.count + tail)])
                try readForCopy(
                    into: UnsafeMutableRawBufferPointer(rebasing: whole[..<head]), at: start)
                UnsafeMutableRawBufferPointer(rebasing: whole[head..<head + bytes.count])
                    .copyMemory(from: bytes)
                try readForCopy(
                    into: UnsafeMutableRawBufferPointer(rebasing: whole[(head + bytes.count)...]),
                    at: end)
                return try top.write(UnsafeRawBufferPointer(whole), at: host)
            }
            try copy(start, count: head, to: host, through: scratch)
            try top.write(bytes, at: host &+ UInt64(head))
            try copy(end, count: tail, to: behind, through: scratch)
        }
    }

    /// Copies guest bytes to host bytes from the mappings of the files they lie in, which spares
    /// a copy in memory.  False where that cannot be done; some may have been copied by then.
    private func copyMapped(_ guest: UInt64, count: Int, to host: UInt64) throws(ImageError) -> Bool
    {
        let end = guest &+ UInt64(count)
        // What is encrypted on the way would be read here, where a file cut short is fatal.
        guard end <= size, !top.isEncrypted else { return false }
        var offset = guest
        while offset < end {
            let source = try locate(offset, limit: end &- offset)
            guard source.extent.kind == .data, let address = address(of: source) else {
                return false
            }
            let byteCount = Int(truncatingIfNeeded: source.extent.byteCount)
            do throws(ImageError) {
                try top.write(
                    UnsafeRawBufferPointer(start: address, count: byteCount),
                    at: host &+ (offset &- guest))
            } catch {
                // EFAULT where a file was cut short.  What is wrong shows when it is read.
                return false
            }
            offset &+= source.extent.byteCount
        }
        return true
    }

    /// Copies guest bytes, as they read now, to host bytes.
    func copy(
        _ guest: UInt64, count: Int, to host: UInt64, _ writing: Writing
    ) throws(ImageError) {
        if try copyMapped(guest, count: count, to: host) { return }
        try writing.scratch.withBuffer { scratch throws(ImageError) in
            try copy(guest, count: count, to: host, through: scratch)
        }
    }

    /// Copies guest bytes, as they read now, to host bytes, piece by piece.
    private func copy(
        _ guest: UInt64, count: Int, to host: UInt64, through scratch: UnsafeMutableRawBufferPointer
    ) throws(ImageError) {
        var done = 0
        while done < count {
            let part = UnsafeMutableRawBufferPointer(
                rebasing: scratch[..<min(count - done, scratch.count)])
            try readForCopy(into: part, at: guest &+ UInt64(done))
            try top.write(UnsafeRawBufferPointer(part), at: host &+ UInt64(done))
            done += part.count
        }
    }

    /// Reads guest bytes under the caller's lock, with zeros past the end of the disk: what is
    /// stored there has no meaning.
    private func readForCopy(
        into buffer: UnsafeMutableRawBufferPointer, at guest: UInt64
    ) throws(ImageError) {
        let inside = Int(min(UInt64(buffer.count), size &- min(guest, size)))
        try readLocked(into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<inside]), at: guest)
        UnsafeMutableRawBufferPointer(rebasing: buffer[inside...])
            .initializeMemory(as: UInt8.self, repeating: 0)
    }

    /// Whether the clusters' bytes before `guest` and after `end` are zeros by metadata.
    private func readsZeroAround(
        _ start: UInt64, _ guest: UInt64, _ end: UInt64, _ tail: UInt64
    ) throws(ImageError) -> Bool {
        guard try isHole(start..<guest) else { return false }
        return try isHole(min(end, size)..<min(end &+ tail, size))
    }

    /// Whether metadata alone proves that `range` reads as zeros; under the caller's lock.
    func isHole(_ range: Range<UInt64>) throws(ImageError) -> Bool {
        var offset = range.lowerBound
        while offset < range.upperBound {
            let run = try holeOrDataLocked(at: offset, limit: range.upperBound &- offset)
            guard run.isHole else { return false }
            offset &+= run.byteCount
        }
        return true
    }

    // MARK: Clusters that are there and show other bytes than theirs

    /// Writes the start of `bytes` into clusters that are ours, where they read as zeros or show
    /// the backing file, with what they read around them, and links them; returns how many bytes.
    private func writeExposing(
        _ bytes: UnsafeRawBufferPointer, at guest: UInt64, _ extent: Extent, _ writing: Writing
    ) throws(ImageError) -> Int {
        try makeTableWritable(at: guest, writing)
        // Zero clusters of a run need not follow each other in the file; extended ones do.
        let clusterRest = map.clusterMask &+ 1 &- guest & map.clusterMask
        let count = min(
            UInt64(bytes.count), extent.byteCount, map.isExtended ? .max : clusterRest)
        let first = extent.host & ~map.clusterMask
        let end = (extent.host &+ count &+ map.clusterMask) & ~map.clusterMask
        if writing.isSuspicious(first, end &- first) {
            try checkSuspiciousTarget(first, end &- first, at: guest, writing)
        }
        let mask = map.subclusterMask
        let range = (guest & ~mask)..<((guest &+ count &+ mask) & ~mask)
        try writeFilled(
            UnsafeRawBufferPointer(rebasing: bytes[..<Int(count)]), at: guest, range,
            to: extent.host &- (guest &- range.lowerBound), writing)
        try linkData(range, at: first, writing)
        return Int(count)
    }
}
