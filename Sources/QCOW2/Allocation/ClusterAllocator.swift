internal import Glibc

/// Which host clusters are in use, and how often: the refcount table and its blocks.
///
/// Counts in memory are live; counts on disk follow with a commit.  A count falls only after the
/// reference was durably removed, so a count that is 0 here belongs to a cluster that may be used.
/// Clusters are handed out from the lowest free one up, inside of the ranges whose refcount block
/// a closed transaction has.
package final class ClusterAllocator: Sendable {
    let file: HostFile
    let guarded: MetadataGuard
    package let format: RefcountFormat
    let clusterBits: UInt64
    /// Counts of a refcount block and of a page of one, as powers of two.
    let blockBits: UInt64
    let pageBits: UInt64
    let state: Monitor<State>

    struct State: ~Copyable {
        /// The refcount table, whole.
        var table: [UInt64]
        /// No entry of the table from here on has a block.
        var blockEnd: Int
        var tableOffset: UInt64
        var cache: RefcountCache
        /// Blocks whose ranges wait for the transaction that made them to close.
        var waitingBlocks: Set<Int> = []
        /// 4 KiB pages of the table changed since the last freeze.
        var dirtyTablePages: Set<Int> = []
        var tableHasMoved = false
        /// For each block that the image came with: whether `vet` has looked at its counts.
        var isVetted: [Bool]
        /// No cluster below is free.
        var hint: UInt64 = 1
        /// Where the last compressed stream ends; 0 where the next one needs a cluster of its own.
        var streamEnd: UInt64 = 0
        /// Whether a count was raised since the last sync that covered one.
        var hasUnsyncedIncrements = false
        /// Whether a count was changed since the last commit wrote them.
        var hasUnwrittenCounts = false
        /// Clusters of tables that were replaced since the last freeze.
        var dropped: [ClusterRun] = []
    }

    package init(
        _ header: Header, in file: HostFile, guarded: MetadataGuard, cacheByteCount: Int = 4 << 20
    ) throws(ImageError) {
        self.file = file
        self.guarded = guarded
        format = RefcountFormat(order: header.refcountOrder)
        clusterBits = UInt64(header.clusterBits)
        blockBits = header.refcountBlockBits
        let pageByteCount = min(Int(header.clusterByteCount), 4096)
        pageBits = UInt64(format.entryCount(inBytes: pageByteCount).trailingZeroBitCount)
        let table = try ClusterAllocator.readTable(header, in: file)
        state = Monitor(
            State(
                table: table, blockEnd: (table.lastIndex { $0 != 0 } ?? -1) + 1,
                tableOffset: header.refcountTableOffset,
                cache: RefcountCache(
                    file: file, pageByteCount: pageByteCount, byteCount: cacheByteCount),
                isVetted: Array(repeating: false, count: table.count)))
        guarded.add(tableClusters(offset: header.refcountTableOffset, entryCount: table.count))
        for entry in table where entry != 0 {
            guarded.addRefcountBlock(RefcountTableEntry(bits: entry).offset &>> clusterBits)
        }
    }

    private static func readTable(_ header: Header, in file: HostFile) throws(ImageError)
        -> [UInt64]
    {
        let byteCount = Int(header.refcountTableClusterCount) << Int(header.clusterBits)
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 8)
        defer { buffer.deallocate() }
        try file.read(into: buffer, at: header.refcountTableOffset)
        return buffer.bindMemory(to: UInt64.self).map { UInt64(bigEndian: $0) }
    }

    func tableClusters(offset: UInt64, entryCount: Int) -> ClusterRun {
        ClusterRun(
            first: offset &>> clusterBits, count: (UInt64(entryCount) &* 8) &>> clusterBits)
    }

    /// Bytes of a cluster.
    var clusterByteCount: UInt64 { 1 &<< clusterBits }

    // MARK: Handing out

    /// Takes up to `count` consecutive clusters, each with a count of 1 from here on; nil where
    /// none is free before the next commit.
    /// - Parameter exactly: whether fewer than `count` are no use.
    /// - Throws: what reading or writing counts says; `.corrupt` where a free cluster turns out to
    ///   be metadata; ENOSPC at the format's limits.
    package func allocate(_ count: Int, exactly: Bool = false) throws(ImageError) -> ClusterRun? {
        try state.withLock { state throws(ImageError) in
            try reserve(&state)
            if let run = try take(count, exactly, &state) { return run }
            try extend(by: UInt64(count), &state)
            return nil
        }
    }

    /// Finds free clusters and gives each a count of 1.
    func take(_ count: Int, _ exactly: Bool, _ state: inout State) throws(ImageError) -> ClusterRun?
    {
        guard let run = try findFree(UInt64(count), exactly, &state) else { return nil }
        for cluster in run.first..<run.end {
            guard !guarded.overlaps(cluster &<< clusterBits, clusterByteCount) else {
                throw freeMetadata(cluster)
            }
        }
        for cluster in run.first..<run.end { try setCount(1, of: cluster, &state) }
        state.hasUnsyncedIncrements = true
        if state.hint == run.first { state.hint = run.end }
        return run
    }

    /// The first free run from the hint on; moves the hint to the first free cluster.
    private func findFree(
        _ count: UInt64, _ exactly: Bool, _ state: inout State
    ) throws(ImageError) -> ClusterRun? {
        var found = ClusterRun(first: 0, count: 0)
        var cluster = state.hint
        var sawFree = false
        while cluster &>> blockBits < UInt64(state.table.count) {
            let block = Int(cluster &>> blockBits)
            guard state.table[block] != 0, !state.waitingBlocks.contains(block) else {
                if found.count > 0, !exactly { return found }
                found.count = 0
                cluster = UInt64(block &+ 1) &<< blockBits
                continue
            }
            try vet(block, &state)
            let bytes = UnsafeRawBufferPointer(try page(of: cluster, &state))
            let pageEnd = (cluster &>> pageBits &+ 1) &<< pageBits
            while cluster < pageEnd {
                let index = Int(truncatingIfNeeded: cluster & (1 &<< pageBits &- 1))
                if format.count(at: index, in: bytes) == 0 {
                    if !sawFree {
                        sawFree = true
                        state.hint = cluster
                    }
                    if found.count == 0 { found.first = cluster }
                    found.count &+= 1
                    if found.count == count { return found }
                } else if found.count > 0 {
                    if !exactly { return found }
                    found.count = 0
                }
                cluster &+= 1
            }
        }
        if !sawFree { state.hint = max(state.hint, usableEnd(state)) }
        return found.count > 0 && !exactly ? found : nil
    }

    /// The end of the highest range that may be used now, as a cluster index.
    func usableEnd(_ state: borrowing State) -> UInt64 {
        var block = state.blockEnd
        while block > 0, state.table[block - 1] == 0 || state.waitingBlocks.contains(block - 1) {
            block -= 1
        }
        return UInt64(block) &<< blockBits
    }

    // MARK: Counts

    /// The page with the count of `cluster`, whose block exists.
    private func page(
        of cluster: UInt64, _ state: inout State
    ) throws(ImageError) -> UnsafeMutableRawBufferPointer {
        let entry = RefcountTableEntry(bits: state.table[Int(cluster &>> blockBits)])
        guard entry.offset & (clusterByteCount &- 1) == 0, entry.offset < Limits.hostOffset else {
            throw file.corrupt(
                "refcount table entry \(cluster &>> blockBits) (\(hex(entry.bits))) "
                    + "is not aligned to a cluster"
            )
        }
        // Counts that are not there would read as zeros: everything would be free.
        guard entry.offset < file.writtenEnd else {
            throw file.corrupt(
                "the refcount block at \(hex(entry.offset)) lies past the end of the file")
        }
        let pageOfBlock = (cluster & (1 &<< blockBits &- 1)) &>> pageBits
        return try state.cache.bytes(
            of: cluster &>> pageBits,
            at: entry.offset &+ pageOfBlock &* UInt64(state.cache.pageByteCount))
    }

    /// The count of `cluster`: 0 where it has no refcount block.
    func count(of cluster: UInt64, _ state: inout State) throws(ImageError) -> UInt64 {
        let block = cluster &>> blockBits
        guard block < UInt64(state.table.count), state.table[Int(block)] != 0 else { return 0 }
        let bytes = UnsafeRawBufferPointer(try page(of: cluster, &state))
        return format.count(at: Int(truncatingIfNeeded: cluster & (1 &<< pageBits &- 1)), in: bytes)
    }

    /// Stores the count of `cluster`, whose block exists.
    func setCount(_ count: UInt64, of cluster: UInt64, _ state: inout State) throws(ImageError) {
        let bytes = try page(of: cluster, &state)
        format.store(count, at: Int(truncatingIfNeeded: cluster & (1 &<< pageBits &- 1)), in: bytes)
        state.cache.markDirty(cluster &>> pageBits)
        state.hasUnwrittenCounts = true
    }

    /// The live count of `cluster` (an index).
    package func count(of cluster: UInt64) throws(ImageError) -> UInt64 {
        try state.withLock { state throws(ImageError) in try count(of: cluster, &state) }
    }

    /// Where the next search for a free cluster begins.
    package var nextCluster: UInt64 {
        get { state.withLock { $0.hint } }
        set { state.withLock { $0.hint = newValue } }
    }

    // MARK: Taking back

    /// Takes back clusters that nothing refers to: what was to be written there failed.
    package func release(_ run: ClusterRun) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            for cluster in run.first..<run.end { try free(cluster, &state) }
        }
    }

    /// Lowers the counts of references that are durably gone.  Clusters that lose their last one
    /// keep a count of 1 and are returned: `free` them when their space was given back.
    package func drop(_ runs: [ClusterRun]) throws(ImageError) -> [ClusterRun] {
        try state.withLock { state throws(ImageError) in
            var last: [ClusterRun] = []
            for run in runs {
                for cluster in run.first..<run.end {
                    endStreams(in: cluster, &state)
                    let count = try count(of: cluster, &state)
                    if count > 1 {
                        try setCount(count &- 1, of: cluster, &state)
                    } else if count == 1 {
                        last.append(joining: ClusterRun(first: cluster, count: 1))
                    }
                }
            }
            return last
        }
    }

    /// Makes clusters free: from here on they may be handed out again.
    package func free(_ runs: [ClusterRun]) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            for run in runs {
                for cluster in run.first..<run.end { try free(cluster, &state) }
            }
        }
    }

    private func free(_ cluster: UInt64, _ state: inout State) throws(ImageError) {
        endStreams(in: cluster, &state)
        try setCount(0, of: cluster, &state)
        state.hint = min(state.hint, cluster)
    }
}
