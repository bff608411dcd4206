/// How many bytes a new file for a disk takes.
public struct Measurement: Equatable, Sendable {
    /// Bytes of the file with what the disk holds now.
    public let required: UInt64
    /// Bytes of the file when every cluster of the disk is written.
    public let fullyAllocated: UInt64
    /// Bytes that copies of the source's persistent bitmaps would take besides, every bit of them
    /// stored; nil where source or new file cannot have any.
    public let bitmaps: UInt64?

    /// A raw file: its length, however much of it is a hole.
    public init(rawDiskOf byteCount: UInt64) {
        required = (byteCount &+ 511) & ~511
        fullyAllocated = required
        bitmaps = nil
    }

    /// A qcow2 image made with `options` for an empty disk of `byteCount` bytes, or for `source`.
    ///
    /// - Throws: `.invalidArgument` where such an image cannot be made, and what looking for the
    ///   holes of `source` throws.
    public init(
        imageOf byteCount: UInt64, holding source: SourceDisk? = nil, options: CreateOptions
    ) throws(ImageError) {
        let name = source?.name ?? ""
        try options.check(file: name)
        _ = try CreationLayout(size: byteCount, options: options, file: name)
        let cluster = options.clusterByteCount
        let disk = (byteCount &+ cluster &- 1) & ~(cluster &- 1)
        let metadata = try Self.metadataByteCount(ofDisk: disk, options)
        fullyAllocated = metadata &+ disk
        let image = options.version == .v3 ? source?.image : nil
        bitmaps = try image.flatMap { image throws(ImageError) in
            try Self.bitmaps(of: image, cluster: cluster)
        }
        switch (options.preallocation, source) {
        case (.falloc, _), (.full, _): required = fullyAllocated
        case (_, let source?): required = try metadata &+ Self.data(in: source, cluster: cluster)
        case (_, nil): required = metadata
        }
    }

    /// Bytes of the header, of all tables for `disk` bytes, of the counts for both, and of a LUKS
    /// header.
    private static func metadataByteCount(
        ofDisk disk: UInt64, _ options: CreateOptions
    ) throws(ImageError) -> UInt64 {
        let cluster = options.clusterByteCount
        let entryByteCount: UInt64 = options.hasExtendedL2 ? 16 : 8
        let l2ByteCount = roundedUp(disk / cluster &* entryByteCount, to: cluster)
        let l1ByteCount = roundedUp(l2ByteCount / cluster &* 8, to: cluster)
        let counted = (cluster &+ l1ByteCount &+ l2ByteCount &+ disk) / cluster
        let countsPerBlock = cluster &* 8 / options.refcountBits
        // Blocks and table are counted themselves, so their number is approached from below.
        var blocks: UInt64 = 0
        var table: UInt64 = 0
        while true {
            let needed = (counted &+ blocks &+ table &+ countsPerBlock &- 1) / countsPerBlock
            let room = roundedUp(needed &* 8, to: cluster) / cluster
            if needed == blocks && room == table { break }
            (blocks, table) = (needed, room)
        }
        // Its counts are left out, as qemu-img does.
        let luks = options.encryption.map { LUKSVolume.areaByteCount(of: $0.suite) } ?? 0
        return cluster &+ l1ByteCount &+ l2ByteCount &+ (blocks &+ table) &* cluster
            &+ roundedUp(luks, to: cluster)
    }

    private static func roundedUp(_ number: UInt64, to unit: UInt64) -> UInt64 {
        (number &+ unit &- 1) / unit &* unit
    }

    /// Bytes of the clusters in which `source` may hold data.
    private static func data(
        in source: SourceDisk, cluster: UInt64
    ) throws(ImageError) -> UInt64 {
        let written = try WrittenRuns(of: source)
        var sum: UInt64 = 0
        var offset: UInt64 = 0
        while offset < source.size {
            let run = try written.run(at: offset, limit: source.size &- offset)
            let end = offset &+ run.byteCount
            guard !run.isHole else {
                offset = end
                continue
            }
            let next = roundedUp(end, to: cluster)
            sum &+= next &- (offset & ~(cluster &- 1))
            offset = next
        }
        return sum
    }

    private static func bitmaps(
        of image: Image, cluster: UInt64
    ) throws(ImageError) -> UInt64? {
        guard image.header.version == 3 else { return nil }
        var sum: UInt64 = 0
        var directory: UInt64 = 0
        for bitmap in try image.header.readBitmaps(from: image.top.file.device) {
            let bits =
                roundedUp(image.size, to: 1 &<< UInt64(bitmap.granularityBits))
                &>> UInt64(bitmap.granularityBits)
            let data = roundedUp((bits &+ 7) / 8, to: cluster)
            sum &+= data &+ roundedUp(data / cluster &* 8, to: cluster)
            directory &+= roundedUp(24 &+ UInt64(bitmap.name.utf8.count), to: 8)
        }
        return sum &+ roundedUp(directory, to: cluster)
    }
}
