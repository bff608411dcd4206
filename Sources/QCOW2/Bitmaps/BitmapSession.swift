internal import Synchronization

/// The bitmaps of an image that is written to, from before the first write to the clean close.
///
/// In between they are in use on disk, so that whoever finds them there after a crash does not
/// believe them.  In memory only what clients change is kept: what is stored is joined with it when
/// the image is closed.
final class BitmapSession: Sendable {
    let tracker = DirtyTracker()
    private let state = Monitor(State())

    private struct State {
        /// In the directory's order.
        var bitmaps: [LiveBitmap] = []
        /// Stored ones that are to go.
        var removed: [LiveBitmap] = []
        /// Whether there is anything to store.
        var hasBegun = false
    }

    /// Takes the bitmaps over, which are in use on disk before anything is written.
    func start(_ bitmaps: [LiveBitmap]) throws(ImageError) {
        var shared: [UInt8: DirtyTracker.Marks] = [:]
        var live = bitmaps
        for index in live.indices
        where live[index].condition == .valid && live[index].entry.isAuto {
            let bits = live[index].entry.granularityBits
            if shared[bits] == nil { shared[bits] = try .init(granularityBits: bits) }
            live[index].marks = shared[bits].map { [$0] } ?? []
        }
        state.withLock { state in
            state.bitmaps = live
            state.hasBegun = true
        }
        tracker.start(Array(shared.values))
    }

    /// The bitmaps to store, nil where there is nothing to store.
    var toStore: [LiveBitmap]? { state.withLock { $0.hasBegun ? $0.bitmaps : nil } }

    var removed: [LiveBitmap] { state.withLock { $0.removed } }

    /// Makes `bitmaps` what is to be stored.
    func take(_ bitmaps: [LiveBitmap], removed: [LiveBitmap]) {
        state.withLock { state in
            state.bitmaps = bitmaps
            state.removed = removed
            state.hasBegun = true
        }
    }

    // MARK: What is no plain write

    /// Why the disk cannot get `byteCount` bytes; nil where the bitmaps allow it.
    func refusal(ofSize byteCount: UInt64, clusterBits: UInt32) -> String? {
        state.withLock { state in
            for bitmap in state.bitmaps {
                let name = bitmap.entry.name
                if bitmap.condition != .valid {
                    let state = bitmap.condition == .foreign ? "not understood" : "inconsistent"
                    return "the bitmap '\(name)' is \(state) and cannot follow another size of "
                        + "the disk; remove it with bitmap --remove"
                }
                guard byteCount > 0 else {
                    return "the bitmap '\(name)' cannot describe a disk of 0 bytes; "
                        + "remove it with bitmap --remove"
                }
                let isAllowed = BitmapEntry.isAllowed(
                    diskByteCount: byteCount, granularityBits: bitmap.entry.granularityBits,
                    clusterBits: clusterBits)
                guard isAllowed else {
                    return "the bitmap '\(name)' would become too large; "
                        + "remove it with bitmap --remove"
                }
            }
            return nil
        }
    }

    /// The disk's size changes: what is behind a new end is forgotten, what is new counts as
    /// changed.
    func recordSize(from old: UInt64, to new: UInt64) {
        state.withLock { state in
            for index in state.bitmaps.indices {
                state.bitmaps[index].keptByteCount = min(state.bitmaps[index].keptByteCount, new)
            }
        }
        if new > old { tracker.record(old, new &- old) }
    }

    /// Every byte of the disk may be another one: it is that of a snapshot now.
    func recordEverything(diskByteCount: UInt64) { tracker.record(0, diskByteCount) }
}
