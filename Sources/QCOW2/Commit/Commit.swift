package import Logging

/// The one place that orders metadata writes.
///
/// A transaction is what changed since the last one was closed.  Its commit writes, in this order:
///
/// 1. raised counts, and tables nothing refers to yet; a sync (guest data is covered by it, and
///    by one of the external data file before it);
/// 2. the changed parts of tables that exist, and the header; a sync.  Now it is durable;
/// 3. nothing: in memory the counts of dropped references fall, freed clusters give their space
///    back and may be used again.  The lower counts ride with the next commit.
///
/// Any subset of the sectors written between two syncs leaves every count at or above the
/// references, and every entry old or new.  One commit runs at a time; flushes that come meanwhile
/// share the next one.
package final class Commit: Sendable {
    private let file: HostFile
    /// The external data file, or `file`.
    private let data: HostFile
    private let map: ClusterMap
    private let allocator: ClusterAllocator
    private let header: HeaderSector
    private let logger: Logger
    private let state: Monitor<State>

    private struct State {
        /// The open transaction's number.
        var open: UInt64 = 1
        /// The last transaction that is durable.
        var ended: UInt64 = 0
        /// The last one that is, and whose dropped references were taken back.
        var settled: UInt64 = 0
        var isRunning = false
        /// A closed transaction whose commit failed: tried again, never merged into the next.
        var unfinished: Transaction?
    }

    package init(
        file: HostFile, data: HostFile, map: ClusterMap, allocator: ClusterAllocator,
        header: HeaderSector, logger: Logger
    ) {
        self.file = file
        self.data = data
        self.map = map
        self.allocator = allocator
        self.header = header
        self.logger = logger
        state = Monitor(State())
    }

    // MARK: Asking for a commit

    /// Returns when everything that was written or changed before the call is on stable storage.
    package func flush() throws(ImageError) {
        let isDirty = self.isDirty
        // After the look at what is dirty: changes of ours are in this transaction or before it.
        let (open, ended) = state.withLock { ($0.open, $0.ended) }
        if isDirty { return try wait { $0.ended >= open } }
        // In-place writes are not part of a transaction that closed before they were made.
        try syncData()
        try syncFile()
        if ended < open &- 1 { try wait { $0.ended >= open &- 1 } }
    }

    /// Commits whatever changed before the call, and takes back the references that were dropped.
    package func now() throws(ImageError) {
        let open = state.withLock { $0.open }
        try wait { $0.settled >= open }
    }

    /// Runs `body` while no commit runs: what it changes falls into one transaction, and no dropped
    /// reference is taken back meanwhile.  `body` must not ask for a commit.
    package func excluding<Result>(
        _ body: () throws(ImageError) -> Result
    ) throws(ImageError) -> Result {
        state.waitFor { state -> Void? in
            if state.isRunning { return nil }
            state.isRunning = true
            return ()
        }
        defer { endRunning() }
        return try body()
    }

    private func endRunning() {
        state.withLock { $0.isRunning = false }
        state.announceChange()
    }

    /// Lets writers wait while more is dirty than memory should hold.
    package func relieve() throws(ImageError) {
        if map.isOverfull { try now() }
    }

    /// The same, and writes lowered counts too; waits only for a commit that runs where there is
    /// nothing to write.
    package func tidy() throws(ImageError) {
        let isDirty = self.isDirty || allocator.hasUnwrittenCounts
        // After the look at what is dirty, as in `flush`.
        let open = state.withLock { $0.open }
        try wait { $0.settled >= (isDirty ? open : open &- 1) }
    }

    private var isDirty: Bool { map.isDirty || allocator.isTableDirty || header.isDirty }

    /// Waits for the end of transactions, leading commits where nobody else does: whoever waited
    /// for one that failed tries again, and learns by itself what is wrong.
    private func wait(until isReached: (State) -> Bool) throws(ImageError) {
        while true {
            let leads = state.waitFor { state -> Bool? in
                if isReached(state) { return false }
                if state.isRunning { return nil }
                state.isRunning = true
                return true
            }
            guard leads else { return }
            defer { endRunning() }
            try runOne()
        }
    }

    // MARK: The order

    private func runOne() throws(ImageError) {
        var transaction = state.withLock { $0.unfinished } ?? close()
        do throws(ImageError) {
            try prepare(&transaction)
            try publish(transaction)
        } catch {
            state.withLock { $0.unfinished = transaction }
            throw error
        }
        map.thaw()
        state.withLock { state in
            state.unfinished = nil
            state.ended = transaction.generation
        }
        state.announceChange()
        do throws(ImageError) {
            try reclaim(transaction)
        } catch {
            // The transaction is durable all the same; its freed clusters are leaks.
            logger.error("freed clusters could not be taken back: \(error)")
        }
        state.withLock { $0.settled = transaction.generation }
    }

    /// Freezes what changed, in one step; later changes belong to the next transaction.
    private func close() -> Transaction {
        map.freeze { frozenMap in
            let refcounts = allocator.freeze()
            if frozenMap.movedL1Table != nil {
                header.change { $0.setL1Table(frozenMap) }
            }
            if refcounts.movedTable != nil {
                header.change { $0.setRefcountTable(refcounts) }
            }
            let generation = state.withLock { state in
                defer { state.open &+= 1 }
                return state.open
            }
            return Transaction(
                generation: generation, map: frozenMap, refcounts: refcounts,
                header: header.freeze(),
                needsFirstSync: frozenMap.exposesData || frozenMap.movedL1Table != nil
                    || refcounts.movedTable != nil)
        }
    }

    /// Phase 1.  Counts are taken now, after the tables were frozen: they cover every reference
    /// that phase 2 writes.
    private func prepare(_ transaction: inout Transaction) throws(ImageError) {
        if allocator.takeUnsyncedIncrements() { transaction.needsFirstSync = true }
        try allocator.writeCounts()
        if let table = transaction.map.movedL1Table {
            try file.write(table, at: transaction.map.l1Offset)
        }
        if let table = transaction.refcounts.movedTable {
            try file.write(table, at: transaction.refcounts.tableOffset)
        }
        // What entries show in a data file is there before them; and whoever waits for this
        // transaction may have written in place.
        try syncData()
        // Nothing new is shown and no count rose: lower counts and entries may share one sync.
        if transaction.needsFirstSync { try syncFile() }
    }

    /// Phase 2, from the frozen copies, never from the live tables.
    private func publish(_ transaction: Transaction) throws(ImageError) {
        for piece in transaction.map.tables.pieces { try file.write(piece.bytes, at: piece.offset) }
        for piece in transaction.refcounts.pages.pieces {
            try file.write(piece.bytes, at: piece.offset)
        }
        if let header = transaction.header { try file.write(header, at: 0) }
        try syncFile()
    }

    /// Makes guest data in an external data file durable.
    private func syncData() throws(ImageError) {
        guard data !== file else { return }
        do throws(ImageError) {
            try data.flush()
        } catch {
            file.stopWriting()
            throw error
        }
    }

    /// Makes what was written to the image durable.  A failed sync of either file ends all writes.
    private func syncFile() throws(ImageError) {
        do throws(ImageError) {
            try file.flush()
        } catch {
            data.stopWriting()
            throw error
        }
    }

    /// Phase 3: what nothing refers to any more gives its space back, then may be used again.
    private func reclaim(_ transaction: Transaction) throws(ImageError) {
        let dropped = transaction.map.dropped + transaction.refcounts.dropped
        guard !dropped.isEmpty else { return }
        let freed = try allocator.drop(dropped.sorted { $0.first < $1.first })
        for run in freed {
            let range = run.first &<< map.clusterBits..<run.end &<< map.clusterBits
            // Less than a page of the file system: it would be zeroed, not given back.
            if range.upperBound &- range.lowerBound >= 4096 { file.punchHole(range) }
        }
        try allocator.free(freed)
    }

    /// Cuts the file behind the last cluster in use; what was dropped has been freed.
    package func cutFile() throws(ImageError) {
        try tidy()
        try allocator.cutFile()
    }

    /// Writes everything, lowered counts too: afterwards counts and references agree.
    package func finish() throws(ImageError) {
        // The first commit frees what the last transaction dropped, the second writes that.
        for _ in 0..<3 { try tidy() }
        try syncData()
        try syncFile()
    }
}

extension Array where Element == UInt8 {
    fileprivate mutating func setL1Table(_ map: FrozenMap) {
        let entryCount = UInt32(truncatingIfNeeded: (map.movedL1Table?.count ?? 0) / 8)
        storeBigEndian(entryCount, at: HeaderField.l1EntryCount)
        storeBigEndian(map.l1Offset, at: HeaderField.l1Offset)
    }

    fileprivate mutating func setRefcountTable(_ refcounts: ClusterAllocator.Frozen) {
        storeBigEndian(refcounts.tableOffset, at: HeaderField.refcountTableOffset)
        storeBigEndian(refcounts.tableClusterCount, at: HeaderField.refcountTableClusterCount)
    }
}
