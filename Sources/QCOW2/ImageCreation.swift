/// Writes one new image.
struct ImageCreation {
    let device: any BlockDevice
    /// The external data file, nil without one.
    let data: (any BlockDevice)?
    let size: UInt64
    let layout: CreationLayout
    let options: CreateOptions

    func run() throws(ImageError) {
        let header = try encodedHeader()
        let volume = try makeVolume()
        try makeDataFile()
        do throws(SystemError) {
            try erase()
            try writeRefcounts()
            try writeMapping()
            try writeData()
            try writeVolume(volume)
            try device.flush()
            // Nothing counts before the header is there, hence the second sync.
            try header.withRawBytes { bytes throws(SystemError) in
                try device.write(bytes, at: 0)
            }
            try device.flush()
        } catch {
            throw ImageError(.system(error, operation: "cannot write"), file: device.name)
        }
    }

    private func encodedHeader() throws(ImageError) -> [UInt8] {
        var header = Header(
            version: options.version == .v2 ? 2 : 3, backingFileOffset: 0, backingFileByteCount: 0,
            clusterBits: layout.clusterBits, size: size,
            encryptionMethod: options.encryption == nil ? 0 : 2,
            l1EntryCount: UInt32(clamping: layout.l1EntryCount),
            l1Offset: layout.l1EntryCount == 0 ? 0 : layout.l1Offset,
            refcountTableOffset: layout.refcountTableOffset,
            refcountTableClusterCount: UInt32(clamping: layout.refcountTableClusterCount),
            snapshotCount: 0, snapshotsOffset: 0)
        header.refcountOrder = UInt32(options.refcountBits.trailingZeroBitCount)
        header.compressionType = options.compressionType
        if options.compressionType != .deflate {
            header.incompatibleFeatures.insert(.compressionType)
        }
        if options.hasExtendedL2 { header.incompatibleFeatures.insert(.extendedL2) }
        if options.hasLazyRefcounts { header.compatibleFeatures.insert(.lazyRefcounts) }
        if let format = options.backingFormat {
            header.extensions.append(
                HeaderExtension(type: HeaderExtension.backingFormat, data: Array(format.utf8)))
        }
        if let name = options.dataFile {
            header.incompatibleFeatures.insert(.externalDataFile)
            if options.dataFileIsRaw { header.autoclearFeatures.insert(.rawExternalData) }
            header.extensions.append(
                HeaderExtension(type: HeaderExtension.externalDataFile, data: Array(name.utf8)))
        }
        if options.encryption != nil {
            let area = EncryptionExtension(
                offset: layout.luksOffset, byteCount: layout.luksByteCount)
            header.extensions.append(
                HeaderExtension(type: HeaderExtension.encryptionHeader, data: area.data))
        }
        // In small clusters the table would leave no room for the backing file's name.
        if options.version == .v3 && layout.clusterByteCount > 4096 {
            header.extensions.append(.featureNameTable)
        }
        header.backingFile = options.backingFile
        do throws(FormatError) {
            return try header.encoded()
        } catch {
            throw ImageError(.malformed(error), file: device.name)
        }
    }

    /// Makes the external data file a disk of zeros.
    private func makeDataFile() throws(ImageError) {
        guard let data else { return }
        do throws(SystemError) {
            if data.readsZerosPastEnd {
                try data.resize(to: 0)
                try data.resize(to: size)
            } else if try data.byteCount() < size {
                throw .noSpace
            } else if options.dataFileIsRaw {
                try writeZeros(0..<size, to: data)
            }
            try preallocate(0..<size, of: data)
            try data.flush()
        } catch {
            throw ImageError(.system(error, operation: "cannot write"), file: data.name)
        }
    }

    /// Makes every byte of the new image zero, and the device as long as the image.
    private func erase() throws(SystemError) {
        if device.readsZerosPastEnd {
            try device.resize(to: 0)
            try device.resize(to: layout.byteCount)
            return
        }
        // Told before anything is lost; other devices may still grow.
        if let disk = device as? FileDevice, disk.isDisk,
            try disk.byteCount() < layout.byteCount
        {
            throw .noSpace
        }
        // The old header goes first: it would describe tables that are overwritten now.
        try writeZeros(0..<min(layout.clusterByteCount, layout.byteCount), to: device)
        try device.flush()
        try writeZeros(0..<layout.byteCount, to: device)
    }

    private func writeRefcounts() throws(SystemError) {
        try writeEntries(layout.refcountBlockCount, at: layout.refcountTableOffset) { index in
            layout.refcountBlocksOffset + index * layout.clusterByteCount
        }
        let format = RefcountFormat(order: UInt32(options.refcountBits.trailingZeroBitCount))
        let byteCount = Int(layout.clusterByteCount)
        let perBlock = UInt64(format.entryCount(inBytes: byteCount))
        var counted: UInt64 = 0
        for block in 0..<layout.refcountBlockCount {
            let count = Int(min(perBlock, layout.clusterCount - counted))
            counted += UInt64(count)
            let counts = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 8)
            defer { counts.deallocate() }
            counts.initializeMemory(as: UInt8.self, repeating: 0)
            for index in 0..<count { format.store(1, at: index, in: counts) }
            try device.write(
                UnsafeRawBufferPointer(counts),
                at: layout.refcountBlocksOffset + block * layout.clusterByteCount)
        }
    }

    /// Without preallocation the L1 table is empty, and there already.
    private func writeMapping() throws(SystemError) {
        guard layout.l2TableCount > 0 else { return }
        try writeEntries(layout.l1EntryCount, at: layout.l1Offset) { index in
            L1Entry(copiedTableAt: layout.l2Offset + index * layout.clusterByteCount).bits
        }
        // In a data file every cluster has the place that it has on the disk.
        let first = options.dataFile == nil ? layout.dataOffset : 0
        // The second word of an extended entry says that the cluster has no data yet; elsewhere
        // the zero flag keeps what was never encrypted from being decrypted.
        let wordsPerEntry = options.l2EntryByteCount / 8
        let isZero = options.encryption != nil && wordsPerEntry == 1
        try writeEntries(layout.mappedClusterCount * wordsPerEntry, at: layout.l2Offset) { index in
            guard index % wordsPerEntry == 0 else { return 0 }
            let cluster = index / wordsPerEntry
            let entry = L2Entry(copiedClusterAt: first + cluster * layout.clusterByteCount)
            return (isZero ? entry.withZeroFlag : entry).bits
        }
    }

    private func writeData() throws(SystemError) {
        guard layout.dataClusterCount > 0 else { return }
        try preallocate(layout.dataOffset..<layout.byteCount, of: device)
    }

    /// Takes space for a range that reads as zeros, where the options ask for it.
    private func preallocate(
        _ range: Range<UInt64>, of device: any BlockDevice
    ) throws(SystemError) {
        switch options.preallocation {
        case .off, .metadata: break
        case .full: try writeZeros(range, to: device)
        case .falloc:
            guard !range.isEmpty else { return }
            do throws(SystemError) {
                try device.reserve(range)
            } catch {
                // Where space cannot be reserved it is taken by writing, as posix_fallocate does.
                guard error == .notSupported else { throw error }
                try writeZeros(range, to: device)
            }
        }
    }

    /// Draws the key of an encrypted image, before anything is written.
    private func makeVolume() throws(ImageError) -> LUKSVolume.New? {
        guard let encryption = options.encryption else { return nil }
        do throws(EncryptionError) {
            return try LUKSVolume.make(encryption)
        } catch {
            throw ImageError(.encryption(error), file: device.name)
        }
    }

    /// Writes the LUKS header and its key slot.
    private func writeVolume(_ volume: LUKSVolume.New?) throws(SystemError) {
        guard let volume else { return }
        try volume.header.encoded().withRawBytes { bytes throws(SystemError) in
            try device.write(bytes, at: layout.luksOffset)
        }
        let offset = UInt64(volume.materialOffset) * LUKSHeader.sectorByteCount
        try device.write(volume.material.bytes, at: layout.luksOffset + offset)
    }

    /// Writes `count` big-endian numbers from `offset` on.
    private func writeEntries(
        _ count: UInt64, at offset: UInt64, _ entry: (UInt64) -> UInt64
    ) throws(SystemError) {
        let room: UInt64 = 65536
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(room) * 8, alignment: 8)
        defer { buffer.deallocate() }
        var done: UInt64 = 0
        while done < count {
            let part = min(count - done, room)
            for index in 0..<part {
                buffer.storeBigEndian(entry(done + index), at: Int(index) * 8)
            }
            try device.write(
                UnsafeRawBufferPointer(rebasing: buffer[..<(Int(part) * 8)]), at: offset + done * 8)
            done += part
        }
    }

    private func writeZeros(
        _ range: Range<UInt64>, to device: any BlockDevice
    ) throws(SystemError) {
        let zeros = [UInt8](
            repeating: 0, count: Int(min(1 << 20, range.upperBound - range.lowerBound)))
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = Int(min(UInt64(zeros.count), range.upperBound - offset))
            try zeros.withRawBytes { bytes throws(SystemError) in
                try device.write(UnsafeRawBufferPointer(rebasing: bytes[..<count]), at: offset)
            }
            offset += UInt64(count)
        }
    }
}
