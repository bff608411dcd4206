import QCOW2
import TestSupport
import Testing

/// What suites on extended L2 entries share: an image of 64 KiB clusters, and its entries.
protocol SubclusterSuite {}

extension SubclusterSuite {
    static var cluster: Int { 65536 }
    static var subcluster: Int { 2048 }

    func image() -> ImageBuilder { ImageBuilder(byteCount: 1.MiB, isExtended: true) }

    func bytes(_ byte: UInt8, subclusters count: Int) -> [UInt8] {
        [UInt8](repeating: byte, count: count * Self.subcluster)
    }

    func range(_ subclusters: Range<Int>, of cluster: Int = 0) -> Range<UInt64> {
        let start = cluster * Self.cluster
        let end = UInt64(start + subclusters.upperBound * Self.subcluster)
        return UInt64(start + subclusters.lowerBound * Self.subcluster)..<end
    }

    /// The host offset and the bitmap of a guest cluster.
    func entry(_ reader: ReferenceReader, _ cluster: Int = 0) throws -> (Int, UInt64) {
        let raw = try reader.rawEntry(forGuestCluster: cluster, in: reader.active)
        return (
            Int(raw & 0x00ff_ffff_ffff_fe00),
            try reader.bitmap(forGuestCluster: cluster, in: reader.active)
        )
    }

    func holds(
        _ reader: ReferenceReader, _ subclusters: Range<Int>, of cluster: Int = 0, _ byte: UInt8,
        backing: UInt8 = 0
    ) throws -> Bool {
        let range = range(subclusters, of: cluster)
        return try reader.read(Int(range.lowerBound)..<Int(range.upperBound)) { _, part in
            part.initializeMemory(as: UInt8.self, repeating: backing)
        }.allSatisfy { $0 == byte }
    }

    /// A backing file full of 0xBB.
    var base: [Image.Backing] { [rawDisk(0xBB, 1.MiB)] }
}
