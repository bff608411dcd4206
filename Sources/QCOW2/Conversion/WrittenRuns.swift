/// The runs of a disk that hold something, as far as it can be told without reading data.
///
/// An image whose tables were preallocated promises data where its file may have holes.  As QEMU
/// does, the file is asked where it takes clearly less space than the counts say.
struct WrittenRuns {
    private let disk: SourceDisk
    /// Which layers have files with holes behind their data.
    private let hasHoles: [Bool]

    init(of disk: SourceDisk) throws(ImageError) {
        self.disk = disk
        hasHoles = try disk.image?.findPreallocatedLayers() ?? []
    }

    /// Whether the bytes from `offset` on are a hole, and for how many, at most `limit`, one look
    /// tells.
    func run(
        at offset: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        guard let image = disk.image, hasHoles.contains(true) else {
            return try disk.run(at: offset, limit: limit)
        }
        return try image.holeOrWritten(at: offset, limit: limit, hasHoles)
    }
}

extension Image {
    /// Which layers have clusters that their file takes no space for.
    fileprivate func findPreallocatedLayers() throws(ImageError) -> [Bool] {
        var found: [Bool] = []
        for index in 0..<layerCount { found.append(try layers[index].isPreallocated()) }
        return found
    }

    /// As `holeOrData`, but what is a hole in one of the files below is one of the disk too.
    fileprivate func holeOrWritten(
        at offset: UInt64, limit: UInt64, _ hasHoles: [Bool]
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        let held = ranges.lockShared(offset, 1)
        defer { ranges.unlock(held) }
        let source = try locate(offset, limit: limit)
        let extent = source.extent
        guard extent.kind == .data, hasHoles[source.layer] else {
            return try holeOrDataLocked(at: offset, limit: limit)
        }
        return try layers[source.layer].holeOrWritten(at: extent.host, limit: extent.byteCount)
    }
}

extension Layer {
    /// Whether clearly more clusters have a count than the file has space for; false where nobody
    /// knows, and where the bytes of a hole are no zeros.
    borrowing func isPreallocated() throws(ImageError) -> Bool {
        guard let header, !isEncrypted, let device = file.device as? FileDevice else {
            return false
        }
        let taken = try asking { () throws(SystemError) in try device.allocatedByteCount() }
        let byteCount = try asking { () throws(SystemError) in try device.byteCount() }
        let cluster = header.clusterByteCount
        let count = taken / cluster
        let threshold = max(count &* 10 / 9, count &+ 2)
        let end = (byteCount &+ cluster &- 1) / cluster
        var refcounts = try StoredRefcounts(device, header: header)
        var counted: UInt64 = 0
        for range in refcounts.coveredRanges where range.lowerBound < end {
            for cluster in range.clamped(to: 0..<end) {
                if let count = try refcounts.count(of: cluster), count > 0 { counted &+= 1 }
                if counted >= threshold { return true }
            }
        }
        return false
    }

    borrowing func holeOrWritten(
        at host: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        let data = data
        return try asking { () throws(SystemError) in
            try data.device.holeOrData(at: host, limit: limit)
        }
    }

    private borrowing func asking<Result>(
        _ body: () throws(SystemError) -> Result
    ) throws(ImageError) -> Result {
        do throws(SystemError) {
            return try body()
        } catch {
            throw ImageError(.system(error, operation: "looking for holes"), file: file.name)
        }
    }
}
