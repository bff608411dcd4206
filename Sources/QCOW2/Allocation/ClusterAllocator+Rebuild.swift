/// Making counts what the references say, in an image that was not closed under lazy refcounts.
extension ClusterAllocator {
    /// Sets every count to what `count` says of a cluster (an index), and adds the blocks that are
    /// missing behind everything that is in use.  A commit makes it durable.
    /// - Parameters:
    ///   - referenced: calls its argument with every referenced cluster, ascending.
    ///   - highest: the highest referenced cluster.
    package func rebuild(
        highest: UInt64, count: (UInt64) -> UInt64, referenced: ((UInt64) -> Void) -> Void
    ) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            for block in state.table.indices where state.table[block] != 0 {
                try setCounts(ofBlock: block, to: count, &state)
            }
            var missing: [Int] = []
            referenced { cluster in
                let block = Int(cluster &>> blockBits)
                let exists = block < state.table.count && state.table[block] != 0
                if !exists, missing.last != block { missing.append(block) }
            }
            let end = (file.writtenEnd &+ clusterByteCount &- 1) &>> clusterBits
            try addBlocks(missing, behind: max(highest &+ 1, end), count: count, &state)
            state.hint = 1
            state.hasUnsyncedIncrements = true
        }
    }

    private func setCounts(
        ofBlock block: Int, to count: (UInt64) -> UInt64, _ state: inout State
    ) throws(ImageError) {
        let first = UInt64(block) &<< blockBits
        for cluster in first..<first &+ 1 &<< blockBits {
            let wanted = count(cluster)
            if try self.count(of: cluster, &state) != wanted {
                try setCount(wanted, of: cluster, &state)
            }
        }
    }

    /// Places the blocks `missing`, and a longer table where they do not fit, from cluster `free`
    /// on, which nothing uses; they count themselves and what they cover.
    private func addBlocks(
        _ missing: [Int], behind free: UInt64, count: (UInt64) -> UInt64, _ state: inout State
    ) throws(ImageError) {
        guard let last = missing.last else { return }
        var next = free
        // New blocks and a longer table need blocks of their own for the place where they lie.
        let room = UInt64(missing.count) &* 2 &+ ((UInt64(last) &* 8) &>> clusterBits) &* 4 &+ 16
        let farthest = max(UInt64(last), (next &+ room) &>> blockBits &+ 1)
        if farthest >= UInt64(state.table.count) {
            next = try moveTable(to: next, covering: farthest &+ 1, &state)
        }
        var waiting = missing
        var own = free..<next
        while let block = waiting.popLast() {
            try place(block: block, at: next, &state)
            let place = Int(next &>> blockBits)
            if state.table[place] == 0, !waiting.contains(place) { waiting.append(place) }
            next &+= 1
            own = free..<next
        }
        for block in state.waitingBlocks { try setCounts(ofBlock: block, to: count, &state) }
        for cluster in own { try setCount(1, of: cluster, &state) }
    }

    /// Moves the table to `cluster`, with at least `entryCount` entries; returns the cluster
    /// behind it.
    private func moveTable(
        to cluster: UInt64, covering entryCount: UInt64, _ state: inout State
    ) throws(ImageError) -> UInt64 {
        let count = (entryCount &* 8 &+ clusterByteCount &- 1) &>> clusterBits
        try checkTableLength(count)
        let run = ClusterRun(first: cluster, count: count)
        try checkRoom(run)
        let old = tableClusters(offset: state.tableOffset, entryCount: state.table.count)
        let entriesPerCluster = clusterByteCount / 8
        state.table += Array(
            repeating: 0, count: Int(count &* entriesPerCluster) - state.table.count)
        replaceTable(old, by: run, &state)
        return run.end
    }
}
