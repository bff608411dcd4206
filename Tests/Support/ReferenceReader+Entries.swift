/// What L2 entries say.
extension ReferenceReader {
    package func entry(_ raw: UInt64) throws(Fault) -> Entry {
        if raw >> 62 & 1 == 1 { return try compressed(raw) }
        guard raw & 0x3f00_0000_0000_01fe == 0 else {
            throw Fault("L2 entry \(hex(raw)) has reserved bits set")
        }
        let offset = Int(raw & Self.offsetMask)
        guard offset % clusterSize == 0 else {
            throw Fault("L2 entry \(hex(raw)) is not aligned to \(clusterSize)")
        }
        guard raw & 1 == 0 else {
            guard version == 3 else { throw Fault("L2 entry \(hex(raw)): zero flag in version 2") }
            return offset == 0 ? .zeroPlain : .zeroAllocated(offset)
        }
        // COPIED alone is the first cluster of a data file.
        if offset == 0, raw != Self.copied || dataFile == nil { return .unallocated }
        return .normal(offset)
    }

    private func compressed(_ raw: UInt64) throws(Fault) -> Entry {
        guard raw >> 63 == 0 else { throw Fault("compressed entry \(hex(raw)) is COPIED") }
        let split = 62 - (clusterBits - 8)
        let offset = raw & ((1 << split) - 1)
        guard offset < 1 << 56 else { throw Fault("compressed entry \(hex(raw)) is absurd") }
        let sectors = Int(raw >> split & ((1 << (clusterBits - 8)) - 1)) + 1
        return .compressed(Int(offset), byteCount: sectors * 512 - Int(offset & 511))
    }

    /// What an extended entry, `raw` with `bitmap`, says of one of its subclusters; a host offset
    /// is the cluster's.
    package func entry(
        _ raw: UInt64, _ bitmap: UInt64, subcluster: Int
    ) throws(Fault) -> Entry {
        if raw >> 62 & 1 == 1 {
            guard bitmap == 0 else {
                throw Fault("compressed entry \(hex(raw)) has the bitmap \(hex(bitmap))")
            }
            return try compressed(raw)
        }
        // Bit 0 says nothing here.
        let cluster = try entry(raw & ~1)
        let (isAllocated, isZero) = (bitmap >> subcluster & 1, bitmap >> (subcluster + 32) & 1)
        guard bitmap & bitmap >> 32 == 0 else {
            throw Fault("L2 entry \(hex(raw)): bitmap \(hex(bitmap)) contradicts itself")
        }
        guard case .normal(let host) = cluster else {
            guard bitmap & 0xffff_ffff == 0 else {
                throw Fault("L2 entry \(hex(raw)): bitmap \(hex(bitmap)) without a cluster")
            }
            return isZero == 1 ? .zeroPlain : .unallocated
        }
        if isZero == 1 { return .zeroAllocated(host) }
        return isAllocated == 1 ? .normal(host) : .unallocated
    }
}
