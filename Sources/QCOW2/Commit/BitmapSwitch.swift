/// Points the header to another bitmap directory, or to none.
///
/// The extension may lie outside of the first sector, where no single write changes it together
/// with the feature bit that makes it valid.  One write within a sector switches from one directory
/// to the next; whatever takes more happens while the bit is off, so that a power cut in between
/// leaves an image without bitmaps, never one with another's clusters for a directory.
package struct BitmapSwitch {
    private let file: HostFile
    private let sector: HeaderSector
    private let header: Header

    package init(file: HostFile, sector: HeaderSector, header: Header) {
        self.file = file
        self.sector = sector
        self.header = header
    }

    /// Makes `directory` the image's, durably; what it points to is on stable storage.  nil: the
    /// image has no bitmaps any more.
    package func point(to directory: BitmapsExtension?) throws(ImageError) {
        let area = try readArea()
        let record = area.record(of: HeaderExtension.bitmaps)
        switch (directory, record) {
        case (nil, nil): try setValid(false)
        case (nil, .some(let record)):
            try setValid(false)
            try remove(record, area)
        case (.some(let directory), .some(let record)):
            try replace(record, by: directory)
        case (.some(let directory), nil):
            try setValid(false)
            try insert(directory, area)
            try setValid(true)
        }
    }

    private func readArea() throws(ImageError) -> ExtensionArea {
        let bytes = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Int(header.clusterByteCount), alignment: 8)
        defer { bytes.deallocate() }
        try file.read(into: bytes, at: 0)
        return ExtensionArea(UnsafeRawBufferPointer(bytes), header)
    }

    private func setValid(_ isValid: Bool) throws(ImageError) {
        let bit = AutoclearFeatures.bitmaps.rawValue
        let old = sector.number(at: HeaderField.autoclearFeatures)
        let new = isValid ? old | bit : old & ~bit
        if new == old { return }
        try sector.changeNow { $0.storeBigEndian(new, at: HeaderField.autoclearFeatures) }
    }

    private func replace(
        _ record: ExtensionArea.Record, by directory: BitmapsExtension
    ) throws(ImageError) {
        let last = record.dataOffset + BitmapsExtension.byteCount - 1
        let isOneSector = record.dataOffset / 512 == last / 512
        if !isOneSector { try setValid(false) }
        try write(directory.encoded, at: record.dataOffset)
        try setValid(true)
    }

    /// The last record's place becomes the end; one before others is only marked as unused.
    private func remove(
        _ record: ExtensionArea.Record, _ area: ExtensionArea
    ) throws(ImageError) {
        var start = [UInt8](repeating: 0, count: 8)
        if record.end != area.end {
            start.storeBigEndian(HeaderExtension.unused, at: 0)
            start.storeBigEndian(UInt32(BitmapsExtension.byteCount), at: 4)
        }
        try write(start, at: record.offset)
    }

    // MARK: A record more

    private func insert(
        _ directory: BitmapsExtension, _ area: ExtensionArea
    ) throws(ImageError) {
        if let unused = area.records.first(where: {
            $0.type == HeaderExtension.unused && $0.byteCount == BitmapsExtension.byteCount
        }) {
            try write(directory.encoded, at: unused.dataOffset)
            return try write(Self.start, at: unused.offset)
        }
        let record = Self.start + directory.encoded + [UInt8](repeating: 0, count: 8)
        if try insertAtOnce(record, area) { return }
        try makeRoom(area, for: record.count)
        // Behind the end marker first: until that is replaced nobody looks there.
        try write(Array(record[8...]), at: area.end + 8)
        try write(Self.start, at: area.end)
    }

    /// Where the record and the backing file's name behind it fit in the first sector, one write
    /// does it all.
    private func insertAtOnce(
        _ record: [UInt8], _ area: ExtensionArea
    ) throws(ImageError) -> Bool {
        let name = area.backingName
        let place = area.end + record.count
        guard !name.isEmpty, place > name.lowerBound,
            place + name.count <= HeaderSector.byteCount
        else { return false }
        try sector.changeNow { header in
            let bytes = Array(header[name])
            header.replaceSubrange(area.end..<place, with: record)
            header.replaceSubrange(place..<place + bytes.count, with: bytes)
            header.storeBigEndian(UInt64(place), at: HeaderField.backingFileOffset)
        }
        return true
    }

    /// Type and length of the bitmaps extension: 8 bytes, aligned, so within a sector.
    private static let start: [UInt8] = {
        var start = [UInt8](repeating: 0, count: 8)
        start.storeBigEndian(HeaderExtension.bitmaps, at: 0)
        start.storeBigEndian(UInt32(BitmapsExtension.byteCount), at: 4)
        return start
    }()

    /// Moves the backing file's name out of the way: first the bytes, then the pointer to them.
    private func makeRoom(_ area: ExtensionArea, for byteCount: Int) throws(ImageError) {
        let name = area.backingName
        let end = area.end + byteCount
        if end <= name.lowerBound, area.hasEndMarker { return }
        let place = max(end, (name.upperBound + 7) & ~7)
        guard place + name.count <= area.clusterByteCount,
            area.hasEndMarker || area.end + 8 <= HeaderSector.byteCount
        else {
            throw ImageError(
                .invalidArgument(
                    "the header has no room for bitmaps beside the other extensions and "
                        + "the backing file's name"), file: file.name)
        }
        var bytes = [UInt8](repeating: 0, count: name.count)
        try bytes.withMutableRawBytes { buffer throws(ImageError) in
            try file.read(into: buffer, at: UInt64(name.lowerBound))
        }
        try write(bytes, at: place)
        try sector.changeNow { header in
            header.storeBigEndian(UInt64(place), at: HeaderField.backingFileOffset)
            // The name's old bytes stand there, and nothing else ends the extensions any more.
            if !area.hasEndMarker { header.storeBigEndian(UInt64(0), at: area.end) }
        }
    }

    /// Writes bytes of the first cluster, durably.
    private func write(_ bytes: [UInt8], at offset: Int) throws(ImageError) {
        let inside = max(0, min(bytes.count, HeaderSector.byteCount - offset))
        if inside > 0 {
            try sector.changeNow { header in
                header.replaceSubrange(offset..<offset + inside, with: bytes[..<inside])
            }
        }
        guard inside < bytes.count else { return }
        try file.write(Array(bytes[inside...]), at: UInt64(offset + inside))
        try file.flush()
    }
}
