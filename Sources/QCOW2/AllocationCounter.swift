internal import Logging
internal import Synchronization

/// How many guest bytes are allocated in the chain, for `st_blocks`.
///
/// A worker counts once, slice by slice; changes behind the place that it has reached are added as
/// they are made, changes before it are seen when it comes there.  Both happen under the lock of
/// the cluster map.
final class AllocationCounter: Sendable {
    /// Bytes counted so far, and changes since.
    private let byteCount = Atomic<Int>(0)
    /// The first guest cluster that was not counted yet.
    private let reached = Atomic<UInt64>(0)
    private let isDone = Atomic<Bool>(false)
    /// How often counting began anew.
    private let round = Atomic<UInt64>(0)
    /// Whether somebody wants to know.
    let isWanted = Atomic(false)
    /// What the layers below showed, where that may change with nobody writing: nil elsewhere.
    private let below: Mutex<ShownRuns>?

    /// - Parameter keepsShown: Whether a raw disk is among the layers below.
    init(keepsShown: Bool) { below = keepsShown ? Mutex(ShownRuns()) : nil }

    /// The count, nil until it is done.
    var counted: UInt64? {
        guard isDone.load(ordering: .acquiring) else { return nil }
        // A sum that may be wrong is never 0: tar takes a file without blocks for a hole.
        let least = below?.withLock(\.isFull) == true ? 512 : 0
        return UInt64(max(byteCount.load(ordering: .relaxed), least))
    }

    /// Keeps what the layers below show next, as counting goes on.
    func keepShown(_ range: Range<UInt64>, isHole: Bool) {
        below?.withLock { $0.keep(range, isHole: isHole) }
    }

    /// What they showed when it was counted; nil where that is not known, or cannot have changed.
    func shown(at offset: UInt64, limit: UInt64) -> (isHole: Bool, byteCount: UInt64)? {
        below?.withLock { $0.holeOrData(at: offset, limit: limit) } ?? nil
    }

    /// Whether changes of `cluster` must be reported.
    func covers(_ cluster: UInt64) -> Bool { cluster < reached.load(ordering: .relaxed) }

    /// An entry of `map` was replaced; `shown`: see `byteCount(of:_:in:)`.
    func note(_ old: L2Entry, _ new: L2Entry, shown: ArraySlice<UInt64>, in map: ClusterMap) {
        let change =
            Self.byteCount(of: new, shown, in: map) - Self.byteCount(of: old, shown, in: map)
        if change != 0 { byteCount.wrappingAdd(change, ordering: .relaxed) }
    }

    func add(_ count: Int, reaching cluster: UInt64) {
        byteCount.wrappingAdd(count, ordering: .relaxed)
        reached.store(cluster, ordering: .relaxed)
    }

    func finish() {
        reached.store(.max, ordering: .relaxed)
        isDone.store(true, ordering: .releasing)
    }

    /// The first guest cluster that was not counted yet.
    var nextCluster: UInt64 { reached.load(ordering: .relaxed) }

    var currentRound: UInt64 { round.load(ordering: .acquiring) }

    /// Forgets what was counted; every range lock is held.
    func restart() {
        round.wrappingAdd(1, ordering: .releasing)
        isDone.store(false, ordering: .releasing)
        reached.store(0, ordering: .relaxed)
        byteCount.store(0, ordering: .relaxed)
        below?.withLock { $0 = ShownRuns() }
    }

    /// Bytes of a guest cluster that are allocated: what has space here, and what shows through.
    /// - Parameter shown: per subcluster, or for the cluster where there are none, how many bytes
    ///   the layers below would show; empty where nothing does.
    static func byteCount(
        of entry: L2Entry, _ shown: ArraySlice<UInt64>, in map: ClusterMap
    ) -> Int {
        let cluster = Int(truncatingIfNeeded: map.clusterMask &+ 1)
        if entry.isCompressed { return cluster }
        guard map.isExtended else {
            if entry.showsData || entry.offset != 0 { return cluster }
            return entry.hasZeroFlag ? 0 : Int(shown.first ?? 0)
        }
        let told = entry.subclusters.allocated | entry.subclusters.zero
        var sum = !map.hasCluster(entry) ? 0 : told.nonzeroBitCount &<< Int(map.subclusterBits)
        for (index, byteCount) in shown.enumerated() where told &>> UInt32(index) & 1 == 0 {
            sum += Int(byteCount)
        }
        return sum
    }
}

extension Image {
    /// Guest bytes allocated in the chain.  Until they are counted, an estimate that is less than
    /// the disk, so that nobody takes the disk for full.
    public var allocatedByteCount: UInt64 {
        if let counted = allocation.counted { return min(counted, size) }
        var estimate: UInt64 = 0
        for index in 0..<layerCount {
            estimate &+= layers[index].data.allocatedByteCount
        }
        return min(estimate, size &- min(size, clusterByteCount))
    }

    /// Counts the allocated bytes: those of a small image at once, which takes two milliseconds at
    /// most, of a larger one in the background; `close()` ends it.
    public func startCountingAllocation() {
        allocation.isWanted.store(true, ordering: .relaxed)
        do throws(ImageError) {
            if try countAllocation(until: .now + .milliseconds(2)) { return }
        } catch {
            return logCountingFailure(error)
        }
        startWorker { image in
            // Readers of the first moments come first.
            if image.waitForClosing(seconds: 0.2) { return }
            image.countAllocationAgain()
        }
    }

    private func logCountingFailure(_ error: ImageError) {
        logger.warning("allocated bytes could not be counted: \(error)")
    }

    /// Goes on counting; false where `deadline` comes first.
    @discardableResult
    private func countAllocation(
        until deadline: ContinuousClock.Instant? = nil
    ) throws(ImageError) -> Bool {
        var cluster = allocation.nextCluster
        let round = allocation.currentRound
        let end = (size &+ map.clusterMask) &>> map.clusterBits
        while !isClosing {
            if let deadline, deadline < .now { return false }
            // Nobody moves the L1 table meanwhile.
            let held = ranges.lockShared(cluster &<< map.clusterBits, 1)
            defer { ranges.unlock(held) }
            guard allocation.currentRound == round else { return true }
            if cluster >= end {
                allocation.finish()
                return true
            }
            cluster = try countSlice(from: cluster, end)
        }
        return true
    }

    /// Counts on, or once more where that was done before the whole disk changed.
    func countAllocationAgain() {
        guard allocation.isWanted.load(ordering: .relaxed) else { return }
        do throws(ImageError) { try countAllocation() } catch { logCountingFailure(error) }
    }

    /// Counts up to the end of a slice, or of a run without tables; returns where it stopped.
    private func countSlice(from cluster: UInt64, _ end: UInt64) throws(ImageError) -> UInt64 {
        let offset = cluster &<< map.clusterBits
        if offset >= backingEnd {
            let next = min(map.endOfMissingTables(from: cluster), end)
            if next > cluster {
                let isCounted = map.whileLocked {
                    guard map.endOfMissingTables(from: cluster) >= next else { return false }
                    allocation.add(0, reaching: next)
                    return true
                }
                if isCounted { return next }
            }
        }
        let next = min(map.endOfSlice(from: cluster), end)
        let shown = try shownByteCounts(cluster, count: Int(next &- cluster), isCounting: true)
        try map.withEntries(cluster, count: Int(next &- cluster)) { entries in
            var sum = 0
            for index in 0..<Int(next &- cluster) {
                sum += AllocationCounter.byteCount(
                    of: entries(index), map.part(of: shown, at: index), in: map)
            }
            allocation.add(sum, reaching: next)
        }
        return next
    }

    /// For each subcluster of `count` guest clusters, or each cluster where there are none, how
    /// many bytes the layers below would show; empty without such layers.
    /// - Parameter isCounting: Whether these are the next ones to be counted.
    func shownByteCounts(
        _ cluster: UInt64, count: Int, isCounting: Bool = false
    ) throws(ImageError) -> [UInt64] {
        guard layerCount > 1 else { return [] }
        let unitBits = map.subclusterBits
        var counts = [UInt64](repeating: 0, count: count &<< Int(map.clusterBits &- unitBits))
        let start = cluster &<< map.clusterBits
        let end = min(start &+ UInt64(count) &<< map.clusterBits, layers[1].size)
        var offset = start
        while offset < end {
            let run = try shownOrHole(at: offset, limit: end &- offset)
            let runEnd = offset &+ run.byteCount
            if isCounting { allocation.keepShown(offset..<runEnd, isHole: run.isHole) }
            while offset < runEnd {
                let unit = (offset &- start) &>> unitBits
                let next = min(start &+ (unit &+ 1) &<< unitBits, runEnd)
                if !run.isHole { counts[Int(unit)] &+= next &- offset }
                offset = next
            }
        }
        return counts
    }

    /// Whether the layers below showed a hole from `offset` on, or show one.
    private func shownOrHole(
        at offset: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        if let known = allocation.shown(at: offset, limit: limit) { return known }
        return try holeOrDataLocked(at: offset, limit: limit, from: 1)
    }
}

extension ClusterMap {
    /// What `shownByteCounts` told of the cluster at `index`.
    func part(of shown: [UInt64], at index: Int) -> ArraySlice<UInt64> {
        guard !shown.isEmpty else { return [] }
        let bits = Int(clusterBits &- subclusterBits)
        return shown[index &<< bits..<(index &+ 1) &<< bits]
    }

    func endOfSlice(from cluster: UInt64) -> UInt64 { (cluster &>> sliceBits &+ 1) &<< sliceBits }

    /// The first cluster from `cluster` on that has an L2 table.
    func endOfMissingTables(from cluster: UInt64) -> UInt64 {
        var index = Int(truncatingIfNeeded: cluster &>> tableBits)
        guard index < l1EntryCount, l1Entry(index).offset == 0 else {
            return index < l1EntryCount ? cluster : .max
        }
        while index < l1EntryCount, l1Entry(index).offset == 0 { index += 1 }
        return index == l1EntryCount ? .max : UInt64(index) &<< tableBits
    }

    func whileLocked<Result>(_ body: () -> Result) -> Result { state.withLock { _ in body() } }

    /// Calls `body`, under the lock, with the entries of clusters of one slice; an L1 entry
    /// without a table has unallocated ones.
    func withEntries(
        _ cluster: UInt64, count: Int, _ body: ((Int) -> L2Entry) -> Void
    ) throws(ImageError) {
        let slice = cluster &>> sliceBits
        let first = Int(truncatingIfNeeded: cluster & (1 &<< sliceBits &- 1))
        let l1Index = Int(truncatingIfNeeded: cluster &>> tableBits)
        while true {
            let entry = l1Entry(l1Index)
            let hasTable = entry.offset != 0 && entry.offset & clusterMask == 0
            if hasTable {
                // Every slot taken by what waits for a commit: one will come.
                guard try ensure(slice) else { continue }
            }
            let isDone = state.withLock { _ -> Bool in
                guard l1Entry(l1Index).offset == entry.offset else { return false }
                guard hasTable else {
                    body { _ in .unallocated }
                    return true
                }
                guard let (slot, _) = cache.find(slice) else { return false }
                body { cache.entry(in: slot, at: first + $0) }
                return true
            }
            if isDone { return }
        }
    }
}
