/// Where everything lies in a new image: header, refcount table, refcount blocks, L1 table, LUKS
/// header, and with preallocation L2 tables and data (unless that has a file of its own), one after
/// the other.
struct CreationLayout {
    let clusterBits: UInt32
    let refcountTableClusterCount: UInt64
    let refcountBlockCount: UInt64
    let l1EntryCount: UInt64
    let l2TableCount: UInt64
    /// Clusters that L2 entries point to, and how many of them lie in this file.
    let mappedClusterCount: UInt64
    let dataClusterCount: UInt64
    let clusterCount: UInt64
    /// Bytes of the LUKS header with its key material; 0 without encryption.
    let luksByteCount: UInt64
    private let luksClusterCount: UInt64
    private let l1ClusterCount: UInt64

    var clusterByteCount: UInt64 { 1 &<< UInt64(clusterBits) }
    var refcountTableOffset: UInt64 { clusterByteCount }
    var refcountBlocksOffset: UInt64 { (1 + refcountTableClusterCount) * clusterByteCount }
    var l1Offset: UInt64 { refcountBlocksOffset + refcountBlockCount * clusterByteCount }
    var luksOffset: UInt64 { l1Offset + l1ClusterCount * clusterByteCount }
    var l2Offset: UInt64 { luksOffset + luksClusterCount * clusterByteCount }
    var dataOffset: UInt64 { l2Offset + l2TableCount * clusterByteCount }
    /// Length of the file: up to the last byte that means something.
    var byteCount: UInt64 {
        if l2TableCount > 0 { return clusterCount * clusterByteCount }
        return luksByteCount > 0 ? luksOffset + luksByteCount : l1Offset + l1EntryCount * 8
    }

    /// - Parameter size: Bytes of the virtual disk, a multiple of 512.
    /// - Throws: `.invalidArgument` where such an image cannot exist.
    init(size: UInt64, options: CreateOptions, file: String) throws(ImageError) {
        let bits = UInt64(options.clusterByteCount.trailingZeroBitCount)  // 9…21
        let cluster = options.clusterByteCount
        clusterBits = UInt32(bits)
        // Every count below is at most 2^55, because the L1 table's limit bounds the size.
        l1EntryCount = size.divided(by: cluster / options.l2EntryByteCount * cluster)
        guard size <= Limits.virtualByteCount, l1EntryCount * 8 <= Limits.l1ByteCount else {
            throw Self.tooLarge(size, cluster, file)
        }
        l1ClusterCount = (l1EntryCount * 8).divided(by: cluster)
        luksByteCount = options.encryption.map { LUKSVolume.areaByteCount(of: $0.suite) } ?? 0
        luksClusterCount = luksByteCount.divided(by: cluster)
        let preallocates = options.mapsClusters
        l2TableCount = preallocates ? l1EntryCount : 0
        mappedClusterCount = preallocates ? size.divided(by: cluster) : 0
        dataClusterCount = options.dataFile == nil ? mappedClusterCount : 0

        let others = 1 + l1ClusterCount + luksClusterCount + l2TableCount + dataClusterCount
        let countsPerBlock = cluster * 8 / options.refcountBits
        // Blocks and table count themselves too: repeat until nothing grows any more.
        var blocks: UInt64 = 1
        var table: UInt64 = 1
        while true {
            let neededBlocks = (others + table + blocks).divided(by: countsPerBlock)
            let neededTable = (neededBlocks * 8).divided(by: cluster)
            if neededBlocks <= blocks && neededTable <= table { break }
            blocks = max(blocks, neededBlocks)
            table = max(table, neededTable)
        }
        refcountBlockCount = blocks
        refcountTableClusterCount = table
        clusterCount = others + table + blocks
        guard table * cluster <= Limits.refcountTableByteCount,
            clusterCount <= Limits.hostOffset / cluster
        else { throw Self.tooLarge(size, cluster, file) }
    }

    private static func tooLarge(_ size: UInt64, _ cluster: UInt64, _ file: String) -> ImageError {
        let wayOut = cluster < 2 << 20 ? "; take a larger cluster size" : ""
        return ImageError(
            .invalidArgument("\(size) bytes are too many for clusters of \(cluster)\(wayOut)"),
            file: file)
    }
}

extension UInt64 {
    /// The quotient, rounded up.
    fileprivate func divided(by divisor: UInt64) -> UInt64 {
        self / divisor + (self % divisor == 0 ? 0 : 1)
    }
}
