internal import Logging

/// Persistent dirty bitmaps: in use from the first write on, stored when the image is closed.
extension Image {
    /// Marks every bitmap in use that the session may make wrong, durably, and takes the bitmaps
    /// over; before the first write.
    func beginBitmaps(_ writing: Writing) throws(ImageError) {
        guard header.autoclearFeatures.contains(.bitmaps), let place = header.bitmaps else {
            return
        }
        let entries = try header.readBitmaps(from: writing.file.device)
        let bitmaps = entries.map {
            LiveBitmap(stored: $0, diskByteCount: size, clusterBits: header.clusterBits)
        }
        // It may lack memory: nothing is in use then.
        try writing.bitmaps.start(bitmaps)
        var isChanged = false
        for (entry, bitmap) in zip(entries, bitmaps) where bitmap.needsMark {
            isChanged = true
            // An attempt that failed may have left the mark in the page cache: it is synced too.
            if entry.isInUse { continue }
            // One flags field: it lies within a sector.
            var flags: [UInt8] = [0, 0, 0, 0]
            flags.storeBigEndian(entry.flags | BitmapEntry.inUse, at: 0)
            try writing.file.write(
                flags,
                at: place.directoryOffset &+ UInt64(entry.directoryOffset)
                    &+ UInt64(BitmapEntry.flagsOffset))
        }
        if isChanged { try writing.file.flush() }
    }

    /// Stores the bitmaps of the session; everything else has been committed, and nobody writes.
    /// - Throws: Where they could not be stored, in which case they stay in use, which is to say
    ///   inconsistent.
    func saveBitmaps(_ writing: Writing) throws(ImageError) {
        guard let bitmaps = writing.bitmaps.toStore else { return }
        let isValid = header.autoclearFeatures.contains(.bitmaps)
        var saving = BitmapSaving(self, writing)
        do throws(ImageError) {
            try saving.save(
                bitmaps, replacing: isValid ? header.bitmaps : nil,
                removed: writing.bitmaps.removed)
        } catch {
            logger.error("the bitmaps could not be stored and are inconsistent now: \(error)")
            throw error
        }
    }

    // MARK: What a stored bitmap marks

    /// Calls `body` with the ranges of the disk, in bytes, that the bitmap `name` marks: ascending,
    /// neighbours joined.
    /// - Throws: `.invalidArgument` where there is no such bitmap, or none that can be believed.
    public func forEachRange(
        markedBy name: String, _ body: (Range<UInt64>) throws(ImageError) -> Void
    ) throws(ImageError) {
        let file = layers.pointee.file
        let entries = try header.readBitmaps(from: file.device)
        guard let entry = entries.first(where: { $0.name == name }) else {
            throw ImageError(.invalidArgument("there is no bitmap '\(name)'"), file: file.name)
        }
        let bitmap = LiveBitmap(
            stored: entry, diskByteCount: header.virtualByteCount, clusterBits: header.clusterBits)
        try bitmap.requireValid(in: file)
        try BitmapTable(of: entry, in: file, clusterByteCount: clusterByteCount)
            .forEachMarkedRange(diskByteCount: header.virtualByteCount, body)
    }
}

extension LiveBitmap {
    /// Throws where nothing is known of the bitmap's marks.
    func requireValid(in file: HostFile) throws(ImageError) {
        switch condition {
        case .valid: return
        case .inconsistent:
            throw ImageError(
                .invalidArgument(
                    "the bitmap '\(entry.name)' is inconsistent, because a program that recorded "
                        + "in it did not close the image; remove it with bitmap --remove"),
                file: file.name)
        case .foreign:
            throw ImageError(
                .invalidArgument(
                    "the bitmap '\(entry.name)' has a type, flags or extra data that are not "
                        + "known; it is kept as it is"), file: file.name)
        }
    }
}
