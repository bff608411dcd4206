/// Room for more counts: refcount blocks, and a longer refcount table.
///
/// New blocks and tables are written where nothing refers to them; the commit's phase 2 makes
/// them known, and only a closed transaction's ranges are used.
extension ClusterAllocator {
    /// Clusters that one request may take: 1 MiB of data, and the tables for it.
    private var requestClusterCount: UInt64 {
        let data = max((1 &<< 20) &>> clusterBits, 1)
        return data &+ data &>> (clusterBits &- 3) &+ 2
    }

    /// Makes blocks ahead, so that growth never stalls a write.
    func reserve(_ state: inout State) throws(ImageError) {
        let end = usableEnd(state)
        let ahead = max(requestClusterCount &* 2 &+ 16, min(end / 20, 16384))
        guard end &- min(state.hint, end) < ahead, state.waitingBlocks.isEmpty else { return }
        do throws(ImageError) {
            try extend(by: ahead, &state)
        } catch {
            // Not needed yet: who needs it gets the error.
            if case .corrupt = error.kind { throw error }
        }
    }

    /// Adds blocks for at least `count` clusters more, unless some wait already.
    func extend(by count: UInt64, _ state: inout State) throws(ImageError) {
        guard state.waitingBlocks.isEmpty else { return }
        let wanted = max(count, requestClusterCount &* 2)
        let blockCount = Int(wanted &>> blockBits) + 1
        for _ in 0..<blockCount { try addBlock(&state) }
    }

    /// Adds the block for the lowest range that has none.
    private func addBlock(_ state: inout State) throws(ImageError) {
        let index = state.table.firstIndex(of: 0) ?? state.table.count
        if index == state.table.count { try growTable(&state) }
        // `growTable` may have brought blocks of its own.
        guard let index = state.table.firstIndex(of: 0) else { return }
        if let run = try take(1, true, &state) {
            do throws(ImageError) {
                try place(block: index, at: run.first, &state)
            } catch {
                try setCount(0, of: run.first, &state)
                state.hint = min(state.hint, run.first)
                throw error
            }
        } else {
            let first = UInt64(index) &<< blockBits
            try place(block: index, at: first, &state)
            do throws(ImageError) {
                try setCount(1, of: first, &state)
            } catch {
                remove(blocks: index..<index + 1, &state)
                throw error
            }
        }
    }

    /// Writes an empty block to `cluster` and enters it into the table in memory.
    func place(block index: Int, at cluster: UInt64, _ state: inout State) throws(ImageError) {
        try checkRoom(ClusterRun(first: cluster, count: 1))
        try file.writeZeroes(cluster &<< clusterBits..<(cluster &+ 1) &<< clusterBits)
        state.table[index] = cluster &<< clusterBits
        state.blockEnd = max(state.blockEnd, index + 1)
        state.waitingBlocks.insert(index)
        state.dirtyTablePages.insert(index &>> 9)
        state.hasUnsyncedIncrements = true
        guarded.addRefcountBlock(cluster)
    }

    /// Moves the table to a place where it has at least half as many entries more.
    private func growTable(_ state: inout State) throws(ImageError) {
        let old = tableClusters(offset: state.tableOffset, entryCount: state.table.count)
        let entriesPerCluster = clusterByteCount / 8
        let growth = max(old.count / 2, 1)
        let count = old.count &+ growth
        try checkTableLength(count)
        let oldEntryCount = state.table.count
        if let run = try take(Int(count), true, &state) {
            state.table += Array(repeating: 0, count: Int(growth &* entriesPerCluster))
            replaceTable(old, by: run, &state)
        } else {
            // No room where counts exist: blocks for a new range, and behind them the table, count
            // themselves.
            var blockCount: UInt64 = 1
            while blockCount &<< blockBits < blockCount &+ count { blockCount &+= 1 }
            let first = UInt64(oldEntryCount) &<< blockBits
            let run = ClusterRun(first: first &+ blockCount, count: count)
            try checkRoom(run)
            state.table += Array(repeating: 0, count: Int(growth &* entriesPerCluster))
            do throws(ImageError) {
                for block in 0..<Int(blockCount) {
                    try place(block: oldEntryCount + block, at: first &+ UInt64(block), &state)
                }
                for cluster in first..<run.end { try setCount(1, of: cluster, &state) }
            } catch {
                // The table has room for no more entries than before where it lies.
                remove(blocks: oldEntryCount..<state.table.count, &state)
                state.table.removeLast(state.table.count - oldEntryCount)
                state.blockEnd = min(state.blockEnd, oldEntryCount)
                state.dirtyTablePages = state.dirtyTablePages.filter { $0 << 9 < oldEntryCount }
                throw error
            }
            replaceTable(old, by: run, &state)
        }
    }

    /// Forgets blocks that could not be finished; nothing but the table in memory refers to them.
    private func remove(blocks: Range<Int>, _ state: inout State) {
        for block in blocks where state.table[block] != 0 {
            guarded.removeRefcountBlock(state.table[block] &>> clusterBits)
            state.table[block] = 0
            state.waitingBlocks.remove(block)
            let first = UInt64(block) &<< blockBits
            state.cache.forget(first &>> pageBits..<(first &+ 1 &<< blockBits) &>> pageBits)
        }
    }

    /// The table lies at `run` from the next commit on.
    func replaceTable(_ old: ClusterRun, by run: ClusterRun, _ state: inout State) {
        state.tableOffset = run.first &<< clusterBits
        state.tableHasMoved = true
        state.dropped.append(old)
        guarded.add(run)
        guarded.remove(old)
    }

    func checkTableLength(_ clusterCount: UInt64) throws(ImageError) {
        guard clusterCount &<< clusterBits > Limits.refcountTableByteCount else { return }
        throw ImageError(
            .system(.noSpace, operation: "the refcount table cannot grow any more"), file: file.name
        )
    }

    func checkRoom(_ run: ClusterRun) throws(ImageError) {
        guard run.end <= Limits.hostOffset &>> clusterBits else {
            throw ImageError(
                .system(.noSpace, operation: "the image has no host offsets left"), file: file.name)
        }
        guard !guarded.overlaps(run.first &<< clusterBits, run.count &<< clusterBits) else {
            throw file.corrupt(
                "metadata lies at \(hex(run.first &<< clusterBits)), which has no refcount"
            )
        }
    }

    /// Cuts the file behind the last cluster whose count is not 0.
    package func cutFile() throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            var cluster = file.writtenEnd &>> clusterBits &+ 1
            while cluster > 1, try count(of: cluster &- 1, &state) == 0 { cluster &-= 1 }
            let end = cluster &<< clusterBits
            if end < file.writtenEnd { try file.resize(to: end) }
        }
    }
}
