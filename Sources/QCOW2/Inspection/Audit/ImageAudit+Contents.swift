extension ImageAudit {
    /// What the disk has, as the active L2 tables say.
    public struct Contents: Sendable, Equatable {
        /// L2 tables that the L1 table points to.
        public var l2TableCount: UInt64 = 0
        /// L2 tables that were looked at: a hostile image can have more than anybody wants to read.
        public var lookedAtCount: UInt64 = 0
        /// Clusters that have bytes of their own.
        public var dataClusterCount: UInt64 = 0
        /// Clusters that are compressed streams.
        public var compressedClusterCount: UInt64 = 0
        /// Bytes of compressed streams, each up to the end of its last sector of 512 bytes.
        public var streamByteCount: UInt64 = 0
        /// Bytes that a copy of the data takes.
        public var expandedByteCount: UInt64 = 0

        /// Whether the numbers are those of the whole disk.
        public var isComplete: Bool { lookedAtCount == l2TableCount }
    }

    /// Bytes of L2 tables that are read.
    private static let tableByteLimit: UInt64 = 256 << 20

    /// Counts clusters, and warns of a disk that is far larger than its file.
    mutating func weighContents(_ device: FileDevice) throws(ImageError) {
        let walk = try ReferenceWalk(device, header: header) { _ in }
        // How often each table is used: a bomb needs only one.
        var uses: [UInt64: UInt64] = [:]
        for (_, entry) in try walk.activeL1Entries() where entry.offset != 0 {
            uses[entry.offset, default: 0] &+= 1
            contents.l2TableCount &+= 1
        }
        var budget = Self.tableByteLimit
        for (offset, count) in uses.sorted(by: { $0.key < $1.key }) {
            guard budget >= header.clusterByteCount else { break }
            budget &-= header.clusterByteCount
            contents.lookedAtCount &+= count
            try weighTable(at: offset, usedTimes: count, walk)
        }
        let ratio = contents.expandedByteCount / max(fileByteCount, 1)
        if !header.hasDataFile, contents.expandedByteCount >= 1 << 30, ratio >= 100 {
            warnings.append(
                "a copy of its data takes \(contents.expandedByteCount) bytes, \(ratio) times "
                    + "the file")
        }
    }

    private mutating func weighTable(
        at offset: UInt64, usedTimes count: UInt64, _ walk: ReferenceWalk
    ) throws(ImageError) {
        for entry in try walk.l2Entries(at: offset) {
            guard isData(entry, isExtended: walk.isExtended) else { continue }
            // At most 2^22 entries lead to tables of 2^18 entries each: less than 2^61 bytes.
            contents.dataClusterCount &+= count
            contents.expandedByteCount &+= count &* header.clusterByteCount
            guard entry.isCompressed else { continue }
            contents.compressedClusterCount &+= count
            let stream = CompressedDescriptor(entry, clusterBits: header.clusterBits)
            contents.streamByteCount &+= count &* UInt64(stream.byteCount)
        }
    }

    private func isData(_ entry: L2Entry, isExtended: Bool) -> Bool {
        if entry.isCompressed { return true }
        guard entry.hasCluster(inDataFile: header.hasDataFile) else { return false }
        return isExtended ? entry.subclusters.allocated != 0 : !entry.hasZeroFlag
    }
}
