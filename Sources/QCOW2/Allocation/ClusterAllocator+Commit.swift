/// What a commit asks of the allocator.
extension ClusterAllocator {
    /// Copies of what a commit writes of the refcount table, taken in one step.
    package struct Frozen: Sendable {
        /// Changed parts of the table, for phase 2.
        package var pages = FrozenPages()
        /// The whole table, where it moved, for phase 1; and where it is now.
        package var movedTable: [UInt8]?
        package var tableOffset: UInt64 = 0
        package var tableClusterCount: UInt32 = 0
        /// Clusters of tables that phase 2 replaces.
        package var dropped: [ClusterRun] = []

        package init() {}
    }

    /// Freezes the table; the ranges of new blocks may be used from here on.
    package func freeze() -> Frozen {
        state.withLock { state in
            var frozen = Frozen()
            if state.tableHasMoved {
                frozen.movedTable = bytes(of: state.table[...])
                frozen.tableOffset = state.tableOffset
                frozen.tableClusterCount = UInt32(
                    truncatingIfNeeded: tableClusters(
                        offset: state.tableOffset, entryCount: state.table.count
                    ).count)
            } else {
                for page in state.dirtyTablePages.sorted() {
                    let range = page << 9..<min((page + 1) << 9, state.table.count)
                    frozen.pages.append(
                        bytes(of: state.table[range]), at: state.tableOffset &+ UInt64(page) << 12)
                }
            }
            frozen.dropped = state.dropped
            state.dropped = []
            state.tableHasMoved = false
            state.dirtyTablePages = []
            for block in state.waitingBlocks {
                state.hint = min(state.hint, UInt64(block) &<< blockBits)
            }
            state.waitingBlocks = []
            return frozen
        }
    }

    private func bytes(of entries: ArraySlice<UInt64>) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: entries.count * 8)
        bytes.withUnsafeMutableBytes { room in
            for (index, entry) in entries.enumerated() { room.storeBigEndian(entry, at: index * 8) }
        }
        return bytes
    }

    /// Whether the table was changed since the last freeze.
    package var isTableDirty: Bool {
        state.withLock { $0.tableHasMoved || !$0.dirtyTablePages.isEmpty || !$0.dropped.isEmpty }
    }

    /// Whether counts in memory differ from those on disk.
    package var hasUnwrittenCounts: Bool { state.withLock { $0.hasUnwrittenCounts } }

    /// Writes every changed count, live: counts that other transactions raised ride along and do
    /// no harm.
    package func writeCounts() throws(ImageError) {
        var page: UInt64 = 0
        state.withLock { $0.hasUnwrittenCounts = false }
        do throws(ImageError) {
            while let written = try state.withLock({ state throws(ImageError) in
                try state.cache.writeDirtyPage(from: page)
            }) {
                page = written &+ 1
            }
        } catch {
            state.withLock { $0.hasUnwrittenCounts = true }
            throw error
        }
    }

    /// Whether a count was raised since this was last asked: a sync must follow before anything
    /// refers to the cluster.
    package func takeUnsyncedIncrements() -> Bool {
        state.withLock { state in
            defer { state.hasUnsyncedIncrements = false }
            return state.hasUnsyncedIncrements
        }
    }

    /// The sync that was to follow `takeUnsyncedIncrements` did not happen.
    package func putBackUnsyncedIncrements() { state.withLock { $0.hasUnsyncedIncrements = true } }
}
