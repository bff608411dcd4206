/// One file of a backing chain: a qcow2 image with its map, or a raw disk.
///
/// Layers live at fixed addresses for as long as the image is open, so that a request goes through
/// them without counting references.
struct Layer: ~Copyable {
    let file: HostFile
    /// Where guest data lies: the external data file of a qcow2 image that has one, else `file`.
    let data: HostFile
    /// Empty for a raw disk.
    let map: ClusterMap
    /// nil for a raw disk.
    let header: Header?
    let isRaw: Bool
    /// Bytes of the layer's virtual disk at open.  The top layer's may change: ask the image.
    let size: UInt64
    /// 0 is the top layer.
    let number: Int
    /// Whether guest data is encrypted, and what decrypts it; nil where the image stays locked.
    let isEncrypted: Bool
    let encryption: EncryptedData?
    /// A mapping of `data` for replies, and how many of its bytes are there for sure.
    let mappedBytes: UnsafeRawBufferPointer?
    private let decompressor: Decompressor?

    init(
        qcow2 header: Header, in file: HostFile, data: HostFile, encryption: EncryptedData?,
        number: Int, cacheByteCount: Int
    ) throws(ImageError) {
        self.file = file
        self.data = data
        self.header = header
        self.number = number
        isRaw = false
        map = try ClusterMap(header, in: file, cacheByteCount: cacheByteCount)
        size = header.virtualByteCount
        isEncrypted = header.encryptionMethod != 0
        self.encryption = encryption
        mappedBytes = isEncrypted ? nil : data.device.mappedBytes
        decompressor = Decompressor(header.compressionType == .zstd ? .zstd : .deflate)
    }

    /// A snapshot of `other`: `header` says where its L1 table lies.
    init(viewing header: Header, of other: borrowing Layer, cacheByteCount: Int)
        throws(ImageError)
    {
        try self.init(
            qcow2: header, in: other.file, data: other.data, encryption: other.encryption,
            number: other.number, cacheByteCount: cacheByteCount)
    }

    /// The same layer once more, for another image over it; it is read only.
    init(sharing other: borrowing Layer) {
        file = other.file
        data = other.data
        map = other.map
        header = other.header
        isRaw = other.isRaw
        size = other.size
        number = other.number
        isEncrypted = other.isEncrypted
        encryption = other.encryption
        mappedBytes = other.mappedBytes
        decompressor = other.header.map {
            Decompressor($0.compressionType == .zstd ? .zstd : .deflate)
        }
    }

    init(raw file: HostFile, number: Int) throws(ImageError) {
        self.file = file
        data = file
        self.number = number
        header = nil
        isRaw = true
        isEncrypted = false
        encryption = nil
        map = try ClusterMap(ofRawDisk: file)
        size = file.writtenEnd
        mappedBytes = file.device.mappedBytes
        decompressor = nil
    }

    /// The run from guest offset `guest` on, at most `limit` bytes, that has one source here.
    @inline(__always)
    borrowing func extent(at guest: UInt64, limit: UInt64) throws(ImageError) -> Extent {
        if isRaw { return Extent(.data, host: guest, byteCount: limit) }
        return try map.extent(at: guest, limit: limit)
    }

    /// Closes the files of the layer, which unlocks them, and wipes its key.
    borrowing func close() {
        file.device.close()
        if hasDataFile { data.device.close() }
        encryption?.close()
    }

    /// Inflates the cluster that `entry`, found for guest offset `guest`, describes, and copies
    /// its bytes from `offset` on into `target`.
    borrowing func readCompressed(
        _ entry: L2Entry, at guest: UInt64, from offset: Int,
        into target: UnsafeMutableRawBufferPointer, through cache: borrowing DecompressedCache
    ) throws(ImageError) {
        guard let header else { return }
        let descriptor = CompressedDescriptor(entry, clusterBits: header.clusterBits)
        guard descriptor.offset < Limits.hostOffset else {
            throw fault(Extent(.corrupt, host: entry.bits, byteCount: 0), at: guest)
        }
        let key = DecompressedCache.Key(
            layer: number, hostOffset: descriptor.offset, byteCount: descriptor.byteCount)
        try cache.copy(
            key, clusterByteCount: Int(header.clusterByteCount), from: offset, into: target
        ) { cluster throws(ImageError) in
            try inflate(descriptor, at: guest, into: cluster)
        }
    }

    private borrowing func inflate(
        _ descriptor: CompressedDescriptor, at guest: UInt64,
        into cluster: UnsafeMutableRawBufferPointer
    ) throws(ImageError) {
        let file = file
        try decompressor?.withStreamBuffer(byteCount: descriptor.byteCount) {
            stream throws(ImageError) in
            try file.read(into: stream, at: descriptor.offset)
            do throws(DecompressionError) {
                try decompressor?.decompress(UnsafeRawBufferPointer(stream), into: cluster)
            } catch {
                throw file.corrupt(
                    "compressed cluster at guest offset \(hex(guest)) "
                        + "(host offset \(hex(descriptor.offset))): \(error)")
            }
        }
    }

    /// What is wrong with a `.corrupt` extent.
    borrowing func fault(_ extent: Extent, at guest: UInt64) -> ImageError {
        let place = "guest offset \(hex(guest))"
        guard let header else { return file.corrupt("\(place) cannot be read") }
        let l1Index = Int(truncatingIfNeeded: guest &>> map.coverageBits)
        if l1Index < map.l1EntryCount, map.l1Entry(l1Index).bits == extent.host,
            extent.host & L1Entry.offsetMask & (header.clusterByteCount &- 1) != 0
        {
            return file.corrupt(
                "\(place): the L2 table at \(hex(extent.host & L1Entry.offsetMask)) "
                    + "is not aligned to the cluster size (\(header.clusterByteCount))")
        }
        let entry = L2Entry(bits: extent.host)
        let isElsewhere = entry.offset != guest & ~map.clusterMask
        if hasDataFile, entry.isCompressed || isElsewhere {
            return file.corrupt("\(place): \(entry.faultWithDataFile)")
        }
        return file.corrupt(
            "\(place): "
                + entry.fault(
                    clusterByteCount: header.clusterByteCount, version: header.version,
                    isExtended: map.isExtended))
    }
}
