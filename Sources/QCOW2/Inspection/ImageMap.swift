/// A run of the disk that one layer answers in one way, as `qemu-img map` lists them.
public struct MappedExtent: Sendable, Equatable {
    /// The first guest byte.
    public var start: UInt64
    /// Bytes of the run.
    public var byteCount: UInt64
    /// The layer that answers: 0 is the image itself, 1 its backing file…
    public var depth: Int
    /// Whether that layer says anything of its own here.
    public var isPresent: Bool
    /// Whether metadata, of the image or of the file system below, proves that zeros are read.
    public var isZero: Bool
    /// Whether bytes are stored for the run.
    public var isData: Bool
    /// Where the bytes lie in the layer's file as they are read; nil for compressed or encrypted
    /// ones, and where there is no room for them.
    public var offset: UInt64?
    /// Whether the bytes are compressed.
    public var isCompressed = false

    /// Takes `next` in where it goes on as this run does.
    mutating func join(_ next: MappedExtent) -> Bool {
        guard start &+ byteCount == next.start, depth == next.depth, isPresent == next.isPresent,
            isZero == next.isZero, isData == next.isData, isCompressed == next.isCompressed,
            next.offset == offset.map({ $0 &+ byteCount })
        else { return false }
        byteCount &+= next.byteCount
        return true
    }
}

extension Image {
    /// Calls `body` with the runs that make up `range`, ascending; neighbours that go on alike are
    /// one.  What it costs depends on the tables that there are, not on the disk's size.
    /// - Throws: `.corrupt` at an entry that makes no sense; what was found before has been told.
    public func forEachMappedExtent(
        in range: Range<UInt64>, _ body: (MappedExtent) throws(ImageError) -> Void
    ) throws(ImageError) {
        let range = range.clamped(to: 0..<size)
        var walk = MapWalk(image: self)
        try walk.walk(range, layer: 0, body)
        if let last = walk.pending { try body(last) }
    }
}

/// Host bytes of a layer of which the file system stores all or nothing.
private struct StoredRun {
    let layer: Int
    let range: Range<UInt64>
    let isHole: Bool
}

/// Goes through the layers from the top down, through each part of each of them once.
private struct MapWalk {
    let image: Image
    /// What was found and may go on.
    var pending: MappedExtent?
    /// Per layer, once asked: whether its clusters were allocated without being written.
    private var isPreallocated: [Int: Bool] = [:]
    /// What the file system said last: holes are asked for again and again.
    private var stored: StoredRun?

    init(image: Image) { self.image = image }

    mutating func walk(
        _ range: Range<UInt64>, layer: Int, _ body: (MappedExtent) throws(ImageError) -> Void
    ) throws(ImageError) {
        let below = image.mappedEnd(ofLayer: layer + 1)
        var offset = range.lowerBound
        while offset < range.upperBound {
            var extent = try extent(of: layer, at: offset, limit: range.upperBound &- offset)
            if extent.kind == .zeroAllocated || extent.isReserved {
                // Such clusters are one run wherever they lie; here their places are listed.
                let mask = image.layers[layer].map.clusterMask
                extent.byteCount = min(extent.byteCount, mask &+ 1 &- offset & mask)
            }
            let end = offset &+ extent.byteCount
            if extent.kind == .unallocated, offset < below {
                let shown = offset..<min(end, below)
                try walk(shown, layer: layer + 1, body)
                offset = shown.upperBound
            } else {
                try tell(extent, layer, at: offset, body)
                offset = end
            }
        }
    }

    private func extent(
        of layer: Int, at offset: UInt64, limit: UInt64
    ) throws(ImageError) -> Extent {
        // Only the top layer's entries may change meanwhile.
        guard layer == 0 else { return try image.layers[layer].extent(at: offset, limit: limit) }
        let held = image.ranges.lockShared(offset, 1)
        defer { image.ranges.unlock(held) }
        return try image.layers[layer].extent(at: offset, limit: limit)
    }

    private mutating func tell(
        _ extent: Extent, _ layer: Int, at start: UInt64,
        _ body: (MappedExtent) throws(ImageError) -> Void
    ) throws(ImageError) {
        var mapped = MappedExtent(
            start: start, byteCount: extent.byteCount, depth: layer, isPresent: true, isZero: false,
            isData: false)
        switch extent.kind {
        case .corrupt: throw image.layers[layer].fault(extent, at: start)
        case .unallocated:
            mapped.isPresent = false
            mapped.isZero = true
            if extent.isReserved { mapped.offset = image.layers[layer].verbatimOffset(extent) }
        case .zeroPlain: mapped.isZero = true
        case .zeroAllocated:
            mapped.isZero = true
            mapped.offset = image.layers[layer].verbatimOffset(extent)
        case .compressed:
            mapped.isData = true
            mapped.isCompressed = true
        case .data:
            mapped.isData = true
            mapped.offset = image.layers[layer].verbatimOffset(extent)
            if mapped.offset != nil, try isSparse(layer) {
                return try tellSparse(mapped, extent.host, body)
            }
        }
        try add(mapped, body)
    }

    /// Asks the file system which of the bytes of a run it keeps.
    private mutating func tellSparse(
        _ run: MappedExtent, _ host: UInt64, _ body: (MappedExtent) throws(ImageError) -> Void
    ) throws(ImageError) {
        let isRaw = image.layers[run.depth].isRaw
        var done: UInt64 = 0
        while done < run.byteCount {
            let found = try storedHoleOrData(
                of: run.depth, at: host &+ done, limit: run.byteCount &- done)
            var part = run
            part.start = run.start &+ done
            part.byteCount = found.byteCount
            part.offset = host &+ done
            part.isZero = found.isHole
            // A cluster was given to the run, whatever the file system made of it.
            part.isData = !(isRaw && found.isHole)
            try add(part, body)
            done &+= found.byteCount
        }
    }

    /// What the file system knows of host bytes of a layer.
    private mutating func storedHoleOrData(
        of layer: Int, at host: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        if let stored, stored.layer == layer, stored.range.contains(host) {
            return (stored.isHole, min(stored.range.upperBound &- host, limit))
        }
        let found = try image.layers[layer].storedHoleOrData(at: host, limit: .max &- host)
        let range = host..<host &+ found.byteCount
        stored = StoredRun(layer: layer, range: range, isHole: found.isHole)
        return (found.isHole, min(found.byteCount, limit))
    }

    private mutating func add(
        _ extent: MappedExtent, _ body: (MappedExtent) throws(ImageError) -> Void
    ) throws(ImageError) {
        if pending?.join(extent) == true { return }
        if let pending { try body(pending) }
        pending = extent
    }

    /// Whether the bytes of a layer's file are worth asking the file system about.
    private mutating func isSparse(_ layer: Int) throws(ImageError) -> Bool {
        if image.layers[layer].isRaw { return true }
        if let known = isPreallocated[layer] { return known }
        let found = try image.layers[layer].holdsUnwrittenClusters()
        isPreallocated[layer] = found
        return found
    }
}

extension Image {
    /// Where a layer of the chain ends for the ones above it; 0 where there is none.
    fileprivate func mappedEnd(ofLayer layer: Int) -> UInt64 {
        guard layer < layerCount else { return 0 }
        let size = layers[layer].size
        // A raw disk ends with its last sector, as QEMU shows it.
        return layers[layer].isRaw ? (min(size, Limits.virtualByteCount) &+ 511) & ~511 : size
    }
}

extension Layer {
    /// The host offset of a run whose bytes lie there as they are read; nil for encrypted ones.
    fileprivate borrowing func verbatimOffset(_ extent: Extent) -> UInt64? {
        header?.encryptionMethod ?? 0 == 0 ? extent.host : nil
    }

    /// What the file system knows of the bytes of guest data.
    fileprivate borrowing func storedHoleOrData(
        at host: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        do throws(SystemError) {
            return try data.device.holeOrData(at: host, limit: limit)
        } catch {
            throw ImageError(.system(error, operation: "looking for holes"), file: data.name)
        }
    }

    /// Whether many more clusters are in use than the file has room for on its file system:
    /// preallocation gave clusters to a disk that nobody has written to since.
    fileprivate borrowing func holdsUnwrittenClusters() throws(ImageError) -> Bool {
        guard let header else { return false }
        let clusterCount = file.writtenEnd &>> UInt64(header.clusterBits)
        let stored = file.allocatedByteCount &>> UInt64(header.clusterBits)
        // The threshold is QEMU's, so that both say the same of an image.
        let threshold = max(stored &* 10 / 9, stored &+ 2)
        guard clusterCount >= threshold else { return false }
        var refcounts = try StoredRefcounts(file.device, header: header)
        var used: UInt64 = 0
        for cluster in 0..<clusterCount {
            if try refcounts.count(of: cluster) ?? 0 > 0 { used &+= 1 }
            if used >= threshold { return true }
        }
        return false
    }
}
