/// Decides how an image becomes consistent again without a change of what the guest reads.
///
/// The order is what makes it safe to be interrupted: counts are raised first, then flags and
/// entries corrected, then counts lowered; a new refcount structure is complete on the disk before
/// one write of the header puts it in place.
struct RepairPlanner {
    private let device: any BlockDevice
    private let examination: Examination
    private let scope: ImageRepair.Scope
    private let header: Header
    private let clusterByteCount: UInt64
    /// The end of what is counted, and what is referenced behind it; in clusters.
    private let clusterEnd: UInt64
    private let pastTheEnd: [Range<UInt64>]

    init(_ device: any BlockDevice, _ examination: Examination, _ scope: ImageRepair.Scope) {
        self.device = device
        self.examination = examination
        self.scope = scope
        header = examination.header
        clusterByteCount = header.clusterByteCount
        clusterEnd = examination.walk.clusterEnd
        pastTheEnd = examination.walk.pastTheEnd.merged
    }

    /// Whether counts may be lowered: not while references are hidden in damaged structures.
    private var mayLower: Bool { !examination.obstacles.contains(.hiddenReferences) }

    func plan() throws(ImageError) -> RepairPlan {
        if scope == .all, needsRebuild() { return try planRebuild() }
        return try planInPlace()
    }

    private func planRebuild() throws(ImageError) -> RepairPlan {
        var plan = RepairPlan()
        let rebuild = try RefcountRebuild(
            device, header: header, keepsUnreferenced: !mayLower)
        // What lies in an old refcount structure has its cluster alone from now on.
        let tables = try corrections(rebuild.allCounts, movesL1: rebuild.movesL1) {
            rebuild.count(of: $0)
        }
        let l1Copy = rebuild.movesL1 ? rebuild.moved(tables.l1Edits) : []
        plan.add(rebuild.newStructures + l1Copy, rebuild.description)
        plan.add([rebuild.headerSwitch], "make the header refer to them")
        plan.add(
            (rebuild.movesL1 ? [] : tables.l1Edits) + tables.edits,
            "entries of L1 and L2 tables that are corrected: \(tables.changedEntryCount)")
        return plan
    }

    private func planInPlace() throws(ImageError) -> RepairPlan {
        var plan = RepairPlan()
        if scope == .all {
            let raised = try countEdits({ max($1, newCount(of: $0, $1)) }, counting: >)
            plan.add(raised.edits, "refcounts that are too low and are raised: \(raised.count)")
        }
        // No count is believed, let alone changed, that may be something else.
        if scope == .leaks, !mayLower || hasBrokenRefcounts() { return plan }
        var stored = examination.stored
        let tables = try corrections(examination.walk.counts) { cluster throws(ImageError) in
            let count = try stored.count(of: cluster) ?? 0
            let new = newCount(of: cluster, count)
            // Beside leaks, flags that are wrong stay so.
            return scope == .all || new == 1 && count > 1 ? new : nil
        }
        let marksSingles = scope == .all || tables.isComplete
        if marksSingles {
            plan.add(
                tables.l1Edits + tables.edits,
                "entries of L1 and L2 tables that are corrected: \(tables.changedEntryCount)")
        }
        if mayLower {
            let lowered = try countEdits(
                { cluster, stored in
                    let new = newCount(of: cluster, stored)
                    // A count that becomes 1 needs its flag.
                    return new == 1 && !marksSingles ? stored : new
                }, counting: <)
            plan.add(lowered.edits, "refcounts that are too high and are lowered: \(lowered.count)")
        }
        return plan
    }

    /// What the count of a cluster becomes in the end.
    private func newCount(of cluster: UInt64, _ stored: UInt64) -> UInt64 {
        if cluster >= clusterEnd, pastTheEnd.haveCluster(cluster) {
            // How often something refers there is not known.
            return scope == .all ? max(stored, 1) : stored
        }
        let found = examination.walk.counts.count(of: cluster)
        return switch (scope, mayLower) {
        case (.all, true): found
        case (.all, false): max(stored, found)
        case (.leaks, _): min(stored, found)
        }
    }

    // MARK: Refcounts

    /// Whether counts cannot be corrected where they are.
    private func needsRebuild() -> Bool {
        if hasBrokenRefcounts() { return true }
        let bits = UInt64(header.clusterBits)
        let l1 = header.l1Offset >> bits..<header.l1Offset >> bits + l1ClusterCount
        if l1.contains(where: examination.walk.counts.isShared) { return true }
        for range in examination.walk.counts.touchedRanges {
            for cluster in range where examination.walk.counts.count(of: cluster) > 0 {
                if examination.stored.blockOffset(examination.stored.blockIndex(of: cluster)) == 0 {
                    return true
                }
            }
        }
        return false
    }

    /// Whether a refcount block lies where it cannot be, or where something else lies too.
    private func hasBrokenRefcounts() -> Bool {
        if examination.obstacles.contains(.brokenRefcounts) { return true }
        return (0..<examination.stored.blockCount).contains {
            let offset = examination.stored.blockOffset($0)
            return offset != 0
                && examination.walk.counts.isShared(offset >> UInt64(header.clusterBits))
        }
    }

    private var l1ClusterCount: UInt64 {
        (UInt64(header.l1EntryCount) &* 8 &+ clusterByteCount &- 1) / clusterByteCount
    }

    /// The blocks in which `wanted`, told a cluster and its stored count, changes something that
    /// `isCounted`; and how many counts that are.
    private func countEdits(
        _ wanted: (_ cluster: UInt64, _ stored: UInt64) -> UInt64,
        counting isCounted: (_ new: UInt64, _ stored: UInt64) -> Bool
    ) throws(ImageError) -> (edits: [RepairPlan.Edit], count: Int) {
        let format = examination.stored.format
        var edits: [RepairPlan.Edit] = []
        var changed = 0
        for block in 0..<examination.stored.blockCount {
            let offset = examination.stored.blockOffset(block)
            guard offset != 0 else { continue }
            var bytes = try Header.read(Int(clusterByteCount), at: offset, of: device)
            let first = block &<< examination.stored.blockBits
            let before = changed
            bytes.withUnsafeMutableBytes { bytes in
                for index in 0..<format.entryCount(inBytes: bytes.count) {
                    let stored = format.count(at: index, in: UnsafeRawBufferPointer(bytes))
                    let cluster = first &+ UInt64(index)
                    let count = min(wanted(cluster, stored), format.maximum)
                    guard count != stored else { continue }
                    format.store(count, at: index, in: bytes)
                    if isCounted(count, stored) { changed += 1 }
                }
            }
            if changed > before { edits.append(RepairPlan.Edit(offset: offset, bytes: bytes)) }
        }
        return (edits, changed)
    }

    // MARK: Entries

    /// COPIED corrected in the active tables where `count` tells what a cluster's count becomes,
    /// and, when everything is to be repaired, bits without a meaning cleared in all of them.
    private func corrections(
        _ references: ReferenceCounts, movesL1: Bool = false,
        count: (UInt64) throws(ImageError) -> UInt64?
    ) throws(ImageError) -> TableCorrections {
        var tables = try TableCorrections(device, header, references, movesL1: movesL1)
        try tables.correctActive(count: count, clearsMeaningless: scope == .all)
        if scope == .all, examination.obstacles.contains(.meaninglessBits) {
            try tables.clearMeaninglessBitsOfSnapshots()
        }
        return tables
    }
}
