internal import Synchronization

/// Durability, and what must be on disk before the first write.
extension Image {
    /// Returns when every write, discard and change before the call is on stable storage, data and
    /// metadata: a power cut afterwards loses nothing of it.
    /// - Throws: `.system` where a write or sync failed; the image takes no writes from then on,
    ///   and every later call throws `.failed`.
    public func flush() throws(ImageError) {
        guard let writing, writing.hasBegun.load(ordering: .acquiring) else { return }
        try writing.commit.flush()
    }

    /// Prepares the image for its first write: autoclear bits that nobody here keeps are cleared,
    /// and bitmaps are marked in use until they are stored again.
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
            try beginBitmaps(writing)
            writing.hasBegun.store(true, ordering: .releasing)
        }
    }
}
