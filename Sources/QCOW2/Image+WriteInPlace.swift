/// The way of a write that changes no entry.  Nothing is allocated or retained on it.
extension Image.Writing {
    /// Writes bytes inside of the disk, group by group.
    func write(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64, _ image: Image
    ) throws(ImageError) {
        try image.begin(self)
        // Before the data: a write that fails counts as one, what is changed is never missed.
        bitmaps.tracker.record(offset, UInt64(bytes.count))
        var done = 0
        while done < bytes.count {
            let start = offset &+ UInt64(done)
            let count = min(bytes.count - done, Int(image.ranges.groupEnd(of: start) &- start))
            let part = UnsafeRawBufferPointer(rebasing: bytes[done..<done + count])
            try writeGroup(part, at: start, image)
            done += count
        }
    }

    /// Writes bytes of one group: in place under the shared lock as far as that goes, the rest
    /// under the exclusive one.
    private func writeGroup(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64, _ image: Image
    ) throws(ImageError) {
        let done = try writeSharing(bytes, at: offset, image)
        guard done < bytes.count else { return }
        try commit.relieve()
        let rest = UnsafeRawBufferPointer(rebasing: bytes[done...])
        let start = offset &+ UInt64(done)
        do throws(ImageError) {
            try writeAlone(rest, at: start, image)
        } catch  where error.isNoSpace {
            // What was dropped since the last commit still takes space.
            try commit.now()
            try writeAlone(rest, at: start, image)
        }
    }

    private func writeAlone(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64, _ image: Image
    ) throws(ImageError) {
        let held = image.ranges.lockExclusive(offset, UInt64(bytes.count))
        defer { image.ranges.unlock(held) }
        try image.writeLocked(bytes, at: offset, self)
    }

    @inline(__always)
    private func writeSharing(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64, _ image: Image
    ) throws(ImageError) -> Int {
        let held = image.ranges.lockShared(offset, UInt64(bytes.count))
        defer { image.ranges.unlock(held) }
        return try writeInPlace(bytes, at: offset, image)
    }

    /// Writes as far as clusters can be written over; returns how far.  The caller holds the range
    /// lock.
    @inline(__always)
    private func writeInPlace(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64, _ image: Image
    ) throws(ImageError) -> Int {
        var done = 0
        while done < bytes.count {
            let guest = offset &+ UInt64(done)
            let extent = try map.extent(at: guest, limit: UInt64(bytes.count &- done))
            guard extent.kind == .data, extent.isCopied else { return done }
            let end = done &+ Int(truncatingIfNeeded: extent.byteCount)
            try write(UnsafeRawBufferPointer(rebasing: bytes[done..<end]), at: guest, extent, image)
            done = end
        }
        return done
    }

    /// Writes over an extent that is ours alone.
    @inline(__always)
    func write(
        _ bytes: UnsafeRawBufferPointer, at guest: UInt64, _ extent: Extent, _ image: Image
    ) throws(ImageError) {
        if isSuspicious(extent.host, UInt64(bytes.count)) {
            try image.checkSuspiciousTarget(extent.host, UInt64(bytes.count), at: guest, self)
        }
        try image.layers.pointee.write(bytes, at: extent.host)
    }

    /// Whether host bytes may be something else than guest data: metadata, or past the end.
    @inline(__always)
    func isSuspicious(_ host: UInt64, _ byteCount: UInt64) -> Bool {
        // A data file has no metadata, and each cluster its own place.
        if map.hasDataFile { return false }
        return guarded.overlaps(host, byteCount)
            || (host &+ byteCount &+ map.clusterMask) & ~map.clusterMask
                > (file.writtenEnd &+ map.clusterMask) & ~map.clusterMask
    }
}
