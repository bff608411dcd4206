/// Counts above one: clusters that a snapshot shares.
extension ClusterAllocator {
    /// Adds a reference to each cluster of `runs`, or to none of them.
    ///
    /// - Parameter mayBeFree: whether a count of 0 is no damage: the reference was given up again.
    /// - Throws: `.invalidArgument` where the counters are too narrow; `.corrupt` for a cluster in
    ///   use whose count is 0; `.system`.
    package func raise(_ runs: [ClusterRun], mayBeFree: Bool = false) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            var done = 0
            do throws(ImageError) {
                for run in runs {
                    for cluster in run.first..<run.end {
                        try raise(cluster, mayBeFree, &state)
                        done += 1
                    }
                }
            } catch {
                try lower(first: done, of: runs, &state)
                throw error
            }
            state.hasUnsyncedIncrements = true
        }
    }

    private func raise(
        _ cluster: UInt64, _ mayBeFree: Bool, _ state: inout State
    ) throws(ImageError) {
        let count = try count(of: cluster, &state)
        try judge(count, of: cluster, mayBeFree)
        try setCount(count &+ 1, of: cluster, &state)
    }

    private func judge(_ count: UInt64, of cluster: UInt64, _ mayBeFree: Bool) throws(ImageError) {
        guard count > 0 || mayBeFree else {
            throw file.corrupt(
                "the cluster at \(hex(cluster &<< clusterBits)) is in use, but its refcount is 0")
        }
        guard count < format.maximum else {
            throw ImageError(
                .invalidArgument(
                    "the image's refcounts have \(1 &<< format.order) bits, which is too narrow "
                        + "for one snapshot more"), file: file.name)
        }
    }

    /// Takes back what was just raised.
    private func lower(
        first number: Int, of runs: [ClusterRun], _ state: inout State
    ) throws(ImageError) {
        var left = number
        for run in runs {
            for cluster in run.first..<run.end where left > 0 {
                let count = try count(of: cluster, &state)
                try setCount(count &- min(count, 1), of: cluster, &state)
                left -= 1
            }
        }
    }

    /// Throws what `raise` would throw for a first reference more, and changes nothing.
    package func checkRaising(_ runs: [ClusterRun]) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            for run in runs {
                for cluster in run.first..<run.end {
                    try judge(try count(of: cluster, &state), of: cluster, false)
                }
            }
        }
    }

    /// For each cluster (an index), whether it has exactly one reference.
    package func haveOneReference(_ clusters: [UInt64]) throws(ImageError) -> [Bool] {
        try state.withLock { state throws(ImageError) in
            var answers: [Bool] = []
            answers.reserveCapacity(clusters.count)
            for cluster in clusters { answers.append(try count(of: cluster, &state) == 1) }
            return answers
        }
    }
}
