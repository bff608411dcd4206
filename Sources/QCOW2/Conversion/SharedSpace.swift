/// Where bytes of a disk lie as they are, one after the other in one file.
struct BytePlace {
    let file: FileDevice
    let offset: UInt64
    let byteCount: UInt64

    var range: Range<UInt64> { offset..<offset &+ byteCount }
}

/// Lets a new file share the space of its source instead of copying it, on file systems where two
/// files can have one extent: xfs, btrfs and others.
struct SharedSpace: Sendable {
    private let source: SourceDisk
    /// What is shared begins and ends at multiples of this, in both files.
    private let blockByteCount: UInt64

    /// Shorter runs are copied sooner than shared.
    private static let leastByteCount: UInt64 = 64 << 10

    /// nil where the file system of `device`, which is new and is empty afterwards, shares no space
    /// with the file that has the source's first bytes.
    init?(from source: SourceDisk, with device: any BlockDevice) throws(ImageError) {
        guard let target = device as? FileDevice, let block = target.blockByteCount,
            let first = try Self.firstPlace(of: source)
        else { return nil }
        let start = first.offset & ~(block &- 1)
        do throws(SystemError) {
            try target.resize(to: 0)
            try target.share(start..<start &+ block, of: first.file, at: 0)
            try target.resize(to: 0)
        } catch {
            return nil
        }
        self.source = source
        blockByteCount = block
    }

    /// Where the disk's first data lies.
    private static func firstPlace(of source: SourceDisk) throws(ImageError) -> BytePlace? {
        var offset: UInt64 = 0
        while offset < source.size {
            let run = try source.run(at: offset, limit: source.size &- offset)
            if !run.isHole { return try source.place(at: offset, limit: run.byteCount) }
            offset &+= run.byteCount
        }
        return nil
    }

    func wholeBlocks(_ byteCount: UInt64) -> UInt64 { byteCount & ~(blockByteCount &- 1) }

    /// Where the start of `range` lies and can be shared from; nil where it has to be copied.
    /// - Parameter alignment: what is shared begins and ends at multiples of this on the disk.
    func place(
        of range: Range<UInt64>, alignment: UInt64 = 1
    ) throws(ImageError) -> BytePlace? {
        let mask = max(alignment, blockByteCount) &- 1
        guard range.lowerBound & mask == 0,
            let place = try source.place(
                at: range.lowerBound, limit: range.upperBound &- range.lowerBound),
            place.offset & (blockByteCount &- 1) == 0
        else { return nil }
        let byteCount = place.byteCount & ~mask
        guard byteCount >= Self.leastByteCount else { return nil }
        return BytePlace(file: place.file, offset: place.offset, byteCount: byteCount)
    }
}

extension Image {
    /// Where the bytes from `offset` on lie as they are, as far as they lie in one place; nil for
    /// what is compressed, encrypted, a hole, or in no file.
    func place(at offset: UInt64, limit: UInt64) throws(ImageError) -> BytePlace? {
        let held = ranges.lockShared(offset, 1)
        defer { ranges.unlock(held) }
        let source = try locate(offset, limit: limit)
        guard source.extent.kind == .data, !layers[source.layer].isEncrypted,
            let file = layers[source.layer].data.device as? FileDevice
        else { return nil }
        return BytePlace(
            file: file, offset: source.extent.host, byteCount: source.extent.byteCount)
    }

    /// Gives whole clusters from `guest` on, which the disk does not have yet, the space of
    /// `place`.  Returns for how many bytes it did: 0 where that cannot be, and they have to be
    /// written.
    func adopt(_ place: BytePlace, at guest: UInt64) throws(ImageError) -> UInt64 {
        let writing = try writer()
        guard !top.isEncrypted else { return 0 }
        try begin(writing)
        let tableEnd = (guest &>> map.coverageBits &+ 1) &<< map.coverageBits
        let end = min(guest &+ place.byteCount, ranges.groupEnd(of: guest), tableEnd)
        writing.bitmaps.tracker.record(guest, end &- guest)
        try writing.commit.relieve()
        let held = ranges.lockExclusive(guest, end &- guest)
        defer { ranges.unlock(held) }
        let extent = try extentToChange(at: guest, limit: end &- guest, writing)
        guard extent.kind == .unallocated, !extent.hasCluster else { return 0 }
        try makeTableWritable(at: guest, writing)
        let wanted = Int(truncatingIfNeeded: extent.byteCount &>> map.clusterBits)
        let run = try allocate(forGuest: guest &>> map.clusterBits, wanted, writing)
        let byteCount = run.count &<< map.clusterBits
        let host = run.first &<< map.clusterBits
        do throws(ImageError) {
            let source = place.offset..<place.offset &+ byteCount
            guard try top.data.share(source, of: place.file, at: host) else {
                try release(run, writing)
                return 0
            }
        } catch {
            try release(run, writing)
            throw error
        }
        try linkData(guest..<guest &+ byteCount, at: host, writing)
        return byteCount
    }
}

extension HostFile {
    /// Makes the bytes at `offset` those of `range` of another file, in the same space; false where
    /// the file system cannot.
    func share(
        _ range: Range<UInt64>, of other: FileDevice, at offset: UInt64
    ) throws(ImageError) -> Bool {
        guard let device = device as? FileDevice else { return false }
        try checkWritable()
        raiseEnd(to: offset &+ (range.upperBound &- range.lowerBound))
        do throws(SystemError) {
            try device.share(range, of: other, at: offset)
            return true
        } catch .notSupported {
            return false
        } catch {
            throw ImageError(.system(error, operation: "writing at offset \(offset)"), file: name)
        }
    }
}
