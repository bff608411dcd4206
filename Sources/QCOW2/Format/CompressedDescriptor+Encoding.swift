extension L2Entry {
    /// The entry of a cluster whose stream has `byteCount` bytes (1 to a cluster's) at host offset
    /// `offset`; nil where the entry has no room for such an offset.
    package init?(compressedStreamAt offset: UInt64, _ byteCount: Int, clusterBits: UInt32) {
        let offsetBits = UInt64(70 &- clusterBits)  // 49…61
        guard offset < min(1 &<< offsetBits, Limits.hostOffset) else { return nil }
        let sectorCount = (offset &+ UInt64(byteCount) &- 1) &>> 9 &- offset &>> 9
        self.init(bits: L2Entry.compressed | sectorCount &<< offsetBits | offset)
    }
}
