/// New counts of clusters, in copies of the refcount blocks.
struct RefcountEdits {
    private let stored: StoredRefcounts
    private let file: HostFile
    private let clusterBits: UInt64
    private var blocks: [UInt64: [UInt8]] = [:]
    private var changed: Set<UInt64> = []

    init(_ stored: StoredRefcounts, _ file: HostFile, clusterBits: UInt64) {
        self.stored = stored
        self.file = file
        self.clusterBits = clusterBits
    }

    /// Sets the count of a cluster that a block counts.
    mutating func set(_ cluster: UInt64, _ count: UInt64) throws(ImageError) {
        let index = stored.blockIndex(of: cluster)
        if blocks[index] == nil {
            var bytes = [UInt8](repeating: 0, count: 1 &<< Int(clusterBits))
            try bytes.withMutableRawBytes { buffer throws(ImageError) in
                try file.read(into: buffer, at: stored.blockOffset(index))
            }
            blocks[index] = bytes
        }
        let inBlock = Int(cluster & (1 &<< stored.blockBits &- 1))
        let format = stored.format
        blocks[index]?.withUnsafeMutableBytes { format.store(count, at: inBlock, in: $0) }
        changed.insert(index)
    }

    /// Writes the blocks that were changed since the last time, each to every place that `places`
    /// gives for its cluster.
    mutating func write(
        to places: (_ cluster: UInt64) -> [UInt64]
    ) throws(ImageError) {
        for index in changed.sorted() {
            guard let bytes = blocks[index] else { continue }
            for place in places(stored.blockOffset(index) &>> clusterBits) {
                try file.write(bytes, at: place &<< clusterBits)
            }
        }
        changed = []
    }
}
