/// L2 tables without zero clusters: without a backing file an empty entry reads the same; over one
/// the entries share clusters that are full of zeros.
struct ZeroExpansion {
    private let clusterByteCount: UInt64
    private let hidesBacking: Bool
    /// Entries that may share a cluster: as many L1 tables may reach each of them.
    private let sharerLimit: Int
    /// Where the tables that were looked at are now.
    private var places: [UInt64: UInt64] = [:]
    private var zeroCluster: UInt64?
    private var sharerCount = 0

    /// - Parameters:
    ///   - hidesBacking: Whether an empty entry would show a backing file.
    ///   - tableCount: How many L1 tables the image has.
    init(_ header: Header, hidesBacking: Bool, tableCount: Int) {
        clusterByteCount = header.clusterByteCount
        self.hidesBacking = hidesBacking
        sharerLimit = max(Int(UInt16.max) / tableCount, 1)
    }

    /// Where the L2 table at `offset` lies without zero clusters: there, or where `append` puts a
    /// copy.  Shared tables stay shared.
    mutating func place(
        ofTableAt offset: UInt64, read: (UInt64) throws(ImageError) -> [UInt8],
        append: ([UInt8]) throws(ImageError) -> UInt64
    ) throws(ImageError) -> UInt64 {
        if let place = places[offset] { return place }
        var table = try read(offset)
        var hasChanged = false
        for position in stride(from: 0, to: table.count - table.count % 8, by: 8) {
            let bits = table.withRawBytes { $0.bigEndian(at: position, as: UInt64.self) } ?? 0
            let entry = L2Entry(bits: bits)
            guard !entry.isCompressed, entry.hasZeroFlag else { continue }
            let new = hidesBacking ? try zeros(append) : 0
            table.storeBigEndian(new, at: position)
            hasChanged = true
        }
        let place = hasChanged ? try append(table) : offset
        places[offset] = place
        return place
    }

    /// A cluster full of zeros that one entry more may refer to.
    private mutating func zeros(
        _ append: ([UInt8]) throws(ImageError) -> UInt64
    ) throws(ImageError) -> UInt64 {
        if let zeroCluster, sharerCount < sharerLimit {
            sharerCount += 1
            return zeroCluster
        }
        let cluster = try append([UInt8](repeating: 0, count: Int(clusterByteCount)))
        zeroCluster = cluster
        sharerCount = 1
        return cluster
    }
}
