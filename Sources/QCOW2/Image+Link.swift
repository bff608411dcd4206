internal import Logging

/// What every change of a mapping needs: a table that may be changed, clusters, the link itself,
/// and the checks before a write.
extension Image {
    /// The run from `guest` on, at most `limit` bytes, that is about to be written or changed.
    /// - Throws: `.corrupt` where its entry makes no sense, or has bits set whose meaning nobody
    ///   knows; the image takes no writes then.
    func extentToChange(
        at guest: UInt64, limit: UInt64, _ writing: Writing
    ) throws(ImageError) -> Extent {
        let extent = try map.extent(at: guest, limit: limit)
        if extent.kind == .corrupt { throw stopWriting(top.fault(extent, at: guest), writing) }
        // What may be written over was found to have none.
        if extent.isCopied { return extent }
        let table = map.l1Entry(ofGuest: guest)
        if table.reservedBits != 0 {
            throw stopWriting(reservedBits(in: "L1 entry \(hex(table.bits))", at: guest), writing)
        }
        let entry = try map.entry(of: guest &>> map.clusterBits)
        if entry.reservedBits != 0 {
            throw stopWriting(reservedBits(in: "L2 entry \(hex(entry.bits))", at: guest), writing)
        }
        return extent
    }

    private func reservedBits(in entry: String, at guest: UInt64) -> ImageError {
        top.file.corrupt("guest offset \(hex(guest)): \(entry) has reserved bits set")
    }

    /// Replaces the entries of `count` guest clusters from `cluster` on, all in one writable
    /// table, waiting for commits where the cache has no room.
    func link(
        _ cluster: UInt64, count: Int, _ writing: Writing,
        _ change: (_ index: Int, _ old: L2Entry) -> L2Entry
    ) throws(ImageError) {
        // Asked before the map's lock is taken, since it may read.
        let shown = try shownByteCounts(cluster, count: count)
        var done = 0
        while done < count {
            let base = done
            done += try map.update(cluster &+ UInt64(base), count: count - base) { index, old in
                var new = change(base + index, old)
                if writing.capture.covers(cluster &+ UInt64(base + index)) {
                    new = writing.capture.follow(old, new, clusterBits: map.clusterBits)
                }
                if allocation.covers(cluster &+ UInt64(base + index)) {
                    allocation.note(
                        old, new, shown: map.part(of: shown, at: base + index), in: map)
                }
                return new
            }
            if done < count { try writing.commit.now() }
        }
    }

    /// Takes up to `count` consecutive clusters, waiting for a commit where none is free now.
    func allocate(_ count: Int, exactly: Bool = false, _ writing: Writing) throws(ImageError)
        -> ClusterRun
    {
        // A commit makes new blocks' ranges usable, a second one frees what the first dropped.
        for _ in 0..<4 {
            do throws(ImageError) {
                if let run = try writing.allocator.allocate(count, exactly: exactly) { return run }
            } catch {
                guard case .corrupt = error.kind else { throw error }
                throw stopWriting(error, writing)
            }
            try writing.commit.now()
        }
        throw ImageError(.system(.noSpace, operation: "no free clusters"), file: top.file.name)
    }

    /// Takes up to `count` consecutive clusters for guest clusters from `first` on.  In an external
    /// data file each has its place already.
    func allocate(forGuest first: UInt64, _ count: Int, _ writing: Writing) throws(ImageError)
        -> ClusterRun
    {
        if map.hasDataFile { return ClusterRun(first: first, count: UInt64(count)) }
        return try allocate(count, writing)
    }

    /// Takes back clusters whose data could not be written.
    func release(_ run: ClusterRun, _ writing: Writing) throws(ImageError) {
        if !map.hasDataFile { try writing.allocator.release(run) }
    }

    // MARK: L2 tables

    /// Makes sure that the L2 table for `guest` exists and is ours alone.
    func makeTableWritable(at guest: UInt64, _ writing: Writing) throws(ImageError) {
        if map.hasWritableTable(at: guest), try isAlone(tableAt: guest, writing) { return }
        try writing.tables.withLock { _ throws(ImageError) in
            try makeTableWritableAlone(at: guest, writing)
        }
    }

    /// The same for whoever holds the lock for replacing tables.
    func makeTableWritableAlone(at guest: UInt64, _ writing: Writing) throws(ImageError) {
        if map.hasWritableTable(at: guest), try isAlone(tableAt: guest, writing) { return }
        try replaceTable(at: guest, writing)
    }

    /// Gives `guest` a table of its own: empty, or a copy of the shared one without COPIED.
    ///
    /// A table that is shared is reached by as many L1 tables as its clusters have references, so
    /// a copy changes no count of data.
    private func replaceTable(at guest: UInt64, _ writing: Writing) throws(ImageError) {
        let index = Int(truncatingIfNeeded: guest &>> map.coverageBits)
        let old = map.l1Entry(index)
        guard old.offset & map.clusterMask == 0 else {
            throw stopWriting(
                top.fault(Extent(.corrupt, host: old.bits, byteCount: 0), at: guest), writing)
        }
        let references = try references(toClusterAt: old.offset, writing)
        let isShared = old.offset == 0 || references != 1
        let run = try allocate(1, exactly: true, writing)
        let offset = run.first &<< map.clusterBits
        do throws(ImageError) {
            try copyTable(from: old.offset, to: offset, clearingCopied: isShared)
        } catch {
            try writing.allocator.release(run)
            throw error
        }
        writing.guarded.addTable(run.first)
        map.replaceTable(index, by: offset, clearingCopied: isShared)
        if writing.capture.covers(table: index) {
            writing.capture.followTable(
                old.offset == 0 ? nil : old.offset &>> map.clusterBits, run.first)
        }
        writing.checkedTables.withLock { _ = $0.insert(offset) }
    }

    /// Writes a table where nothing refers to it yet; no old one (offset 0) means zeros.
    private func copyTable(
        from old: UInt64, to new: UInt64, clearingCopied: Bool
    ) throws(ImageError) {
        let file = layers.pointee.file
        let byteCount = Int(map.clusterMask &+ 1)
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 4096)
        defer { buffer.deallocate() }
        if old == 0 {
            buffer.initializeMemory(as: UInt8.self, repeating: 0)
        } else {
            try file.read(into: buffer, at: old)
            if clearingCopied { clearCopied(in: buffer) }
        }
        try file.write(UnsafeRawBufferPointer(buffer), at: new)
    }

    private func clearCopied(in table: UnsafeMutableRawBufferPointer) {
        for position in stride(from: 0, to: table.count, by: 1 << Int(map.entryBits)) {
            let entry = L2Entry(
                bits: UnsafeRawBufferPointer(table).bigEndian(at: position) ?? 0)
            if entry.isCopied, !entry.isCompressed {
                table.storeBigEndian(entry.withoutCopied.bits, at: position)
            }
        }
    }

    /// Whether a table that is marked COPIED is what it says, judged before it is changed for the
    /// first time; it must not lie where other metadata is.
    ///
    /// A snapshot that a power cut interrupted leaves tables with a count that is too high, and one
    /// that is really shared must stay as it is: either is replaced by a copy.
    private func isAlone(tableAt guest: UInt64, _ writing: Writing) throws(ImageError) -> Bool {
        let offset = map.l1Entry(Int(truncatingIfNeeded: guest &>> map.coverageBits)).offset
        if writing.checkedTables.withLock({ $0.contains(offset) }) { return true }
        let count = try references(toClusterAt: offset, writing)
        guard count > 0, !writing.guarded.collides(tableAt: offset) else {
            throw stopWriting(
                top.file.corrupt(
                    "the L2 table at \(hex(offset)) (guest offset "
                        + "\(hex(guest))) lies where other metadata is, or is not allocated"),
                writing)
        }
        guard count == 1 else { return false }
        writing.checkedTables.withLock { _ = $0.insert(offset) }
        return true
    }

    /// The count of the host cluster at `offset`; one that cannot be known ends all writes.
    private func references(
        toClusterAt offset: UInt64, _ writing: Writing
    ) throws(ImageError) -> UInt64 {
        do throws(ImageError) {
            return try writing.allocator.count(of: offset &>> map.clusterBits)
        } catch {
            guard case .corrupt = error.kind else { throw error }
            throw stopWriting(error, writing)
        }
    }

    // MARK: Before a write

    /// Throws unless host bytes are guest data: a write never lands in metadata, nor in a cluster
    /// that is not allocated.
    @inline(never)
    func checkSuspiciousTarget(
        _ host: UInt64, _ byteCount: UInt64, at guest: UInt64, _ writing: Writing
    ) throws(ImageError) {
        let place =
            "guest offset \(hex(guest)) is mapped to host offset \(hex(host))"
        if writing.guarded.overlaps(host, byteCount) {
            throw stopWriting(top.file.corrupt("\(place), which is metadata"), writing)
        }
        // Past the end of the file: fine if it is allocated.
        for cluster in host &>> map.clusterBits...(host &+ byteCount &- 1) &>> map.clusterBits {
            guard try references(toClusterAt: cluster &<< map.clusterBits, writing) == 0 else {
                continue
            }
            throw stopWriting(top.file.corrupt("\(place), which is not allocated"), writing)
        }
    }

    /// Damage was met while writing: marks the image corrupt, takes no more writes, and returns
    /// the error to throw.
    func stopWriting(_ error: ImageError, _ writing: Writing) -> ImageError {
        guard (try? top.file.checkWritable()) != nil else { return error }
        logger.critical("\(error); the image takes no more writes")
        if top.header?.version == 3 {
            do throws(ImageError) {
                try writing.header.changeNow { $0.setFeature(.corrupt) }
            } catch {
                logger.error("the corrupt bit could not be set: \(error)")
            }
        }
        top.file.stopWriting()
        top.data.stopWriting()
        return error
    }
}

extension Array where Element == UInt8 {
    /// Sets an incompatible feature bit of a version 3 header.
    fileprivate mutating func setFeature(_ feature: IncompatibleFeatures) {
        let bits = withUnsafeBytes {
            $0.bigEndian(at: HeaderField.incompatibleFeatures, as: UInt64.self) ?? 0
        }
        storeBigEndian(bits | feature.rawValue, at: HeaderField.incompatibleFeatures)
    }
}
