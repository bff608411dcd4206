/// Counts that cannot be: 0 for a cluster of metadata.
///
/// Damage that zeroes counts seldom spares those of metadata.  Where they are 0, a guest's clusters
/// may be said to be free too, and would be overwritten when they are handed out.
extension ClusterAllocator {
    /// Looks at the counts of the header, the refcount table and `runs`, which are metadata.
    /// - Throws: `.corrupt` where one of them is 0.
    func checkCounted(_ runs: [ClusterRun]) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            let table = tableClusters(offset: state.tableOffset, entryCount: state.table.count)
            for run in [ClusterRun(first: 0, count: 1), table] + runs {
                for cluster in run.first..<run.end where try count(of: cluster, &state) == 0 {
                    throw freeMetadata(cluster)
                }
            }
        }
    }

    /// Looks, before anything of a block's range is handed out, at the counts of metadata there;
    /// once for each block that the image came with.
    func vet(_ block: Int, _ state: inout State) throws(ImageError) {
        guard block < state.isVetted.count, !state.isVetted[block] else { return }
        let first = UInt64(block) &<< blockBits
        for cluster in first..<first &+ 1 &<< blockBits where guarded.isMarked(cluster) {
            if try count(of: cluster, &state) == 0, guarded.isMetadata(cluster) {
                throw freeMetadata(cluster)
            }
        }
        state.isVetted[block] = true
    }

    func freeMetadata(_ cluster: UInt64) -> ImageError {
        file.corrupt(
            "the refcount of the metadata at \(hex(cluster &<< clusterBits)) is 0: repair it with "
                + "check --repair all, or mount it with --read-only")
    }
}
