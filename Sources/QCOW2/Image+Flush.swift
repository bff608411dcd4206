internal import Synchronization

/// Durability, and what must be on disk before the first write.
extension Image {
    /// Returns when every write, discard and change before the call is on stable storage, data and
    /// metadata: a power cut afterwards loses nothing of it.
    public func flush() throws(ImageError) {
        guard let writing, writing.hasBegun.load(ordering: .acquiring) else { return }
        try writing.commit.flush()
    }

    /// Prepares the image for its first write: autoclear bits that nobody here keeps are cleared,
    /// and bitmaps, which will miss what is written, are marked in use.
    @inline(__always)
    func begin(_ writing: Writing) throws(ImageError) {
        if writing.hasBegun.load(ordering: .acquiring) { return }
        try beginSlowly(writing)
    }

    @inline(never)
    private func beginSlowly(_ writing: Writing) throws(ImageError) {
        try writing.structure.withLock { _ throws(ImageError) in
            if writing.hasBegun.load(ordering: .acquiring) { return }
            let known = header.autoclearFeatures.intersection(.known)
            if header.version == 3, known != header.autoclearFeatures {
                try writing.header.changeNow {
                    $0.storeBigEndian(known.rawValue, at: HeaderField.autoclearFeatures)
                }
            }
            try markBitmapsInUse()
            writing.hasBegun.store(true, ordering: .releasing)
        }
    }

    /// Sets the in-use flag of every bitmap; each flags field lies within one sector.
    private func markBitmapsInUse() throws(ImageError) {
        guard header.autoclearFeatures.contains(.bitmaps) else { return }
        var isChanged = false
        guard let place = header.bitmaps else { return }
        for bitmap in try header.readBitmaps(from: top.file.device) where !bitmap.isInUse {
            var flags: [UInt8] = [0, 0, 0, 0]
            flags.storeBigEndian(bitmap.flags | BitmapEntry.inUse, at: 0)
            let entry = place.directoryOffset &+ UInt64(bitmap.directoryOffset)
            try top.file.write(flags, at: entry &+ UInt64(BitmapEntry.flagsOffset))
            isChanged = true
        }
        if isChanged { try top.file.flush() }
    }
}
