/// How the clusters of an image's file are used.
public struct SpaceUsage: Sendable, Equatable {
    /// Bytes of the file.
    public var fileByteCount: UInt64
    /// Bytes of a cluster.
    public var clusterByteCount: UInt64
    /// Clusters of the file that are counted as used: by the header, tables, data and what leaks.
    public var usedClusterCount: UInt64 = 0
    /// Clusters of the file that are free: `Image.compact` gives their space back.
    public var freeClusterCount: UInt64 = 0
    /// Used clusters with more than one reference, such as snapshots share.
    public var sharedClusterCount: UInt64 = 0
}

extension Image {
    /// How the clusters of the image's own file are used now; an open image counts what is about to
    /// be freed as used.  Takes time in proportion to the file's length.
    /// - Throws: `.system` and `.corrupt` where the counts cannot be read.
    public func spaceUsage() throws(ImageError) -> SpaceUsage {
        let file = top.file
        var usage = SpaceUsage(
            fileByteCount: file.writtenEnd, clusterByteCount: clusterByteCount)
        let end = (usage.fileByteCount &+ clusterByteCount &- 1) / clusterByteCount
        var stored = writing == nil ? try StoredRefcounts(file.device, header: header) : nil
        for cluster in 0..<end {
            let count =
                if let writing { try writing.allocator.count(of: cluster) } else {
                    try stored?.count(of: cluster) ?? 0
                }
            if count == 0 { usage.freeClusterCount &+= 1 } else { usage.usedClusterCount &+= 1 }
            if count > 1 { usage.sharedClusterCount &+= 1 }
        }
        return usage
    }
}
