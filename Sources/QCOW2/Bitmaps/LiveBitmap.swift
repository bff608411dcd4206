/// A bitmap of an image that is being written to: what is stored, and what came since.
struct LiveBitmap: Sendable {
    enum Condition: Sendable {
        /// What is stored was right when the session began.
        case valid
        /// Nobody knows what was written since it was stored.
        case inconsistent
        /// It uses what nobody here knows, and is kept as it is.
        case foreign
    }

    /// The entry of the directory, with the flags that it shall have when it is stored.
    var entry: BitmapEntry
    let condition: Condition
    /// Bytes of the disk from its start whose stored marks count; less than the disk where it
    /// shrank meanwhile, 0 where the bitmap was cleared.
    var keptByteCount: UInt64
    /// Bytes of the disk that the stored table describes.
    let storedByteCount: UInt64
    /// What is marked besides.
    var marks: [DirtyTracker.Marks] = []

    /// A bitmap as the directory of an image of `diskByteCount` bytes has it.
    init(stored entry: BitmapEntry, diskByteCount: UInt64, clusterBits: UInt32) {
        self.entry = entry
        keptByteCount = diskByteCount
        storedByteCount = diskByteCount
        let fits = entry.fits(diskByteCount: diskByteCount, clusterBits: clusterBits)
        condition =
            entry.isInUse
            ? .inconsistent
            : !entry.isUnderstood ? .foreign : fits ? .valid : .inconsistent
        // A foreign one that records cannot be trusted after writes that it does not know of.
        if condition != .valid, condition != .foreign || entry.isAuto {
            self.entry.flags |= BitmapEntry.inUse
        }
    }

    /// A bitmap that marks nothing.
    init(new name: [UInt8], granularityBits: UInt8) {
        entry = BitmapEntry(
            tableOffset: 0, tableEntryCount: 0, flags: BitmapEntry.auto,
            type: BitmapEntry.dirtyTracking, granularityBits: granularityBits, nameBytes: name,
            extraData: [], directoryOffset: 0)
        condition = .valid
        keptByteCount = 0
        storedByteCount = 0
    }

    /// Whether it must be marked in use on disk before the first write.
    var needsMark: Bool { condition == .valid || entry.isInUse }
}
