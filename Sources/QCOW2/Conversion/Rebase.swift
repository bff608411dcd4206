internal import Glibc

/// Puts another backing file under an image, whose disk stays as it is.
public enum Rebase {
    /// Makes `backing` the backing file of the image at `path`.
    ///
    /// What would read differently over it is copied up and durable before the header changes, so
    /// that the disk stays the same whenever this is interrupted.
    ///
    /// - Parameters:
    ///   - path: Where the overlay is.
    ///   - options: How its files are opened.
    ///   - threadCount: Threads that compare, the caller's included.
    ///   - backing: Stored as it is, and found relative to the image; nil for none.
    ///   - format: The backing file's format; nil has it found out by the magic.
    ///   - isUnsafe: Whether only the header changes: nothing is compared, and `backing` need not
    ///     be there, but `format` has to be given.
    ///   - progress: Told what part is done; false cancels.
    /// - Throws: what opening, reading, writing and amending throw; `.cancelled`.
    public static func run(
        path: String, onto backing: String?, format: SourceDisk.Format? = nil,
        isUnsafe: Bool = false, options: OpenOptions = OpenOptions(), threadCount: Int = 2,
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        var header = AmendOptions()
        header.backingFile = backing ?? ""
        header.backingFormat = format?.rawValue
        if !isUnsafe {
            let image = try Image.open(path, options: options)
            defer { try? image.close() }
            let disk = try backing.flatMap { name throws(ImageError) in
                try SourceDisk(
                    path: BackingResolver.location(of: name, from: path), format: format,
                    options: OpenOptions(
                        access: .readOnly, policy: options.policy,
                        passphrases: options.passphrases))
            }
            try copyUp(image, over: disk, threadCount: threadCount, progress: progress)
            if let disk { header.backingFormat = disk.image == nil ? "raw" : "qcow2" }
            try disk?.close()
            try image.close()
        }
        try Image.amend(path, options: header, policy: options.policy)
    }

    /// Copies into `image` whatever would read differently over `backing`, and makes it durable.
    ///
    /// - Parameters:
    ///   - backing: The disk that is going to lie below; nil where none will.
    ///   - progress: Told what part is done; false cancels.
    /// - Throws: what reading and writing throw; `.cancelled`, with the image reading as before.
    static func copyUp(
        _ image: Image, over backing: SourceDisk?, threadCount: Int,
        progress: ((Double) -> Bool)?
    ) throws(ImageError) {
        let cluster = image.clusterByteCount
        let pieceByteCount = max(DiskWalk.pieceByteCount, cluster)
        let half = Int(pieceByteCount)
        let sources = [SourceDisk(image)] + (backing.map { [$0] } ?? [])
        // A cluster is hidden or kept as a whole, wherever the backing files have their holes.
        try DiskWalk(
            over: sources, end: image.size, pieceByteCount: pieceByteCount, unitByteCount: cluster
        ).run(
            threadCount: threadCount, bufferByteCount: 2 * half, progress: progress
        ) { piece, buffer throws(ImageError) in
            guard !piece.isHole else { return }
            var offset = piece.range.lowerBound
            while offset < piece.range.upperBound {
                let run = try image.ownRun(at: offset, limit: piece.range.upperBound &- offset)
                let end = offset &+ run.byteCount
                if !run.isOwn {
                    let count = Int(run.byteCount)
                    let old = UnsafeMutableRawBufferPointer(rebasing: buffer[..<count])
                    let new = UnsafeMutableRawBufferPointer(rebasing: buffer[half..<half + count])
                    try image.read(into: old, at: offset)
                    if let backing {
                        try backing.readPadded(into: new, at: offset)
                    } else {
                        new.initializeMemory(as: UInt8.self, repeating: 0)
                    }
                    try keep(
                        UnsafeRawBufferPointer(old), UnsafeRawBufferPointer(new), at: offset, image)
                }
                offset = end
            }
        }
        try image.flush()
    }

    /// Writes those clusters of `old` that differ from `new`.
    private static func keep(
        _ old: UnsafeRawBufferPointer, _ new: UnsafeRawBufferPointer, at offset: UInt64,
        _ image: Image
    ) throws(ImageError) {
        let cluster = image.clusterByteCount
        var done = 0
        while done < old.count {
            let place = offset &+ UInt64(done)
            let rest = Int(min(cluster &- place % cluster, UInt64(old.count &- done)))
            let part = UnsafeRawBufferPointer(rebasing: old[done..<done + rest])
            let other = UnsafeRawBufferPointer(rebasing: new[done..<done + rest])
            if let a = part.baseAddress, let b = other.baseAddress, memcmp(a, b, rest) != 0 {
                if ZeroScan.isZero(part), image.header.version >= 3 {
                    try image.hide(place..<place &+ UInt64(rest))
                } else {
                    try image.write(part, at: place)
                }
            }
            done += rest
        }
    }
}

extension Image {
    /// Whether the bytes from `offset` on are in this image itself, zeros included, and for how
    /// many, at most `limit`, one look tells.
    func ownRun(
        at offset: UInt64, limit: UInt64
    ) throws(ImageError) -> (isOwn: Bool, byteCount: UInt64) {
        let held = ranges.lockShared(offset, 1)
        defer { ranges.unlock(held) }
        let extent = try map.extent(at: offset, limit: limit)
        return (extent.kind != .unallocated, extent.byteCount)
    }

    /// Makes an unallocated cluster, or unallocated subclusters of one, read as zeros, whatever
    /// lies below; in version 3.
    func hide(_ range: Range<UInt64>) throws(ImageError) {
        let writing = try writer()
        try begin(writing)
        try writing.commit.relieve()
        let held = ranges.lockExclusive(range.lowerBound, 1)
        defer { ranges.unlock(held) }
        let hidden = map.subclusters(of: range, inCluster: range.lowerBound &>> map.clusterBits)
        try change(range, writing) { _, old in
            guard map.isExtended else { return old == .unallocated ? .zeroPlain : old }
            return old.zeroing(
                hidden, hasCluster: map.hasCluster(old), keepsCluster: true, hidesBacking: true)
        }
    }
}
