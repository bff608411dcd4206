/// What an image needs whose refcounts may be wrong: one that was not closed, before it is written
/// to, and one with a change of the snapshots that was given up half-way, before it is closed.
extension Image.Writing {
    /// Makes counts and COPIED flags agree with the references, then clears the dirty bit.
    /// - Throws: `.corrupt` where references cannot be counted because a structure is damaged.
    func rebuildRefcounts(
        _ header: Header, map: ClusterMap, file: HostFile
    ) throws(ImageError) {
        var damage: CheckFinding?
        var walk = try ReferenceWalk(file.device, header: header) { damage = damage ?? $0 }
        try walk.run()
        if let damage {
            throw file.corrupt(
                "its refcounts may be wrong, and cannot be rebuilt (\(damage)): "
                    + "mount it with --read-only to save its data"
            )
        }
        let counts = walk.counts
        try allocator.rebuild(
            highest: counts.highestCluster ?? 0, count: { counts.count(of: $0) },
            referenced: { body in counts.forEach { cluster, _ in body(cluster) } })
        try commit.finish()
        for index in 0..<map.l1EntryCount {
            try map.correctCopied(ofTable: index) { counts.count(of: $0) == 1 }
            try commit.relieve()
        }
        try commit.finish()
        guard header.version == 3 else { return }
        let features = header.incompatibleFeatures.subtracting(.dirty)
        try self.header.changeNow {
            $0.storeBigEndian(features.rawValue, at: HeaderField.incompatibleFeatures)
        }
    }
}

extension ClusterMap {
    /// Sets COPIED in an L1 entry and in its table's entries where, and only where, `isSingle`
    /// says that the target has one reference.
    func correctCopied(ofTable index: Int, isSingle: (UInt64) -> Bool) throws(ImageError) {
        let entry = l1Entry(index)
        guard entry.offset != 0, entry.offset & clusterMask == 0 else { return }
        setCopied(isSingle(entry.offset &>> clusterBits), ofTable: index)
        let first = UInt64(index) &<< tableBits
        for slice in stride(from: first, to: first &+ 1 &<< tableBits, by: 1 &<< Int(sliceBits)) {
            let done = try update(slice, count: 1 &<< Int(sliceBits)) { _, old in
                guard !old.isCompressed, old.offset != 0 else { return old }
                if hasDataFile { return old.withCopied(true) }
                return old.withCopied(isSingle(old.offset &>> clusterBits))
            }
            guard done > 0 else { throw file.corrupt("the cache has no room for an L2 table") }
        }
    }
}
