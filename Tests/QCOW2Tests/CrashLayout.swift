import QCOW2
import TestSupport
import Testing

/// An image that a crash test starts from.
struct CrashLayout: Sendable, CustomTestStringConvertible {
    var version: UInt32 = 3
    var clusterBits: Int
    var refcountOrder = 4
    var guestClusters: Int
    var hasSnapshot = true
    var hasBacking = false
    var hasCompressed = false
    /// Whether guest data lies in an external data file, and whether that is raw.
    var hasDataFile = false
    var isRaw = false
    /// Whether guest data is encrypted with LUKS.
    var isEncrypted = false
    /// Whether L2 entries have 32 subclusters.
    var isExtended = false
    /// Whether each guest cluster is stored.
    var isFull = false
    /// Whether there are bitmaps, one of them disabled, and how many bytes of another extension lie
    /// before theirs in the header.
    var hasBitmaps = false
    var headerFill = 0
    /// Milliseconds between commits of the engine's own; nil for none.
    var commitInterval: Int?

    var byteCount: Int { guestClusters << clusterBits }
    var sectorCount: Int { byteCount / 512 }
    var sectorsPerCluster: Int { 1 << (clusterBits - 9) }
    /// A discard on version 2 over a backing file cannot hide it, so what it gives is not told.
    var canDiscard: Bool { version == 3 || !hasBacking }

    var testDescription: String {
        ["v\(version)", "\(1 << clusterBits) B", "\(1 << refcountOrder)-bit counts"]
            .joined(separator: ", ") + (hasSnapshot ? ", snapshot" : "")
            + (hasDataFile ? (isRaw ? ", raw data file" : ", data file") : "")
            + (isExtended ? ", subclusters" : "") + (isEncrypted ? ", LUKS" : "")
            + (hasBitmaps ? ", bitmaps behind \(headerFill) bytes" : "")
            + (hasBacking ? ", backing" : "") + (hasCompressed ? ", compressed" : "")
            + (commitInterval == nil ? "" : ", timer")
    }

    // What sectors hold before the first write.
    static let stored: UInt64 = 1
    static let backed: UInt64 = 2
    static let compressed: UInt64 = 3

    /// Some subclusters allocated, some zero, some neither.
    static let mixed: UInt64 = 0x0000_FF0F << 32 | 0xF00F_0000

    /// The image, and what its guest sectors hold, all of it in the snapshot too.
    func build() -> (image: [UInt8], values: [UInt64]) {
        if hasDataFile { return buildWithDataFile() }
        if isEncrypted { return encryptedDisk.content }
        var image = ImageBuilder(
            byteCount: byteCount, version: version, clusterBits: clusterBits,
            refcountOrder: refcountOrder, isExtended: isExtended)
        image.backingName = hasBacking ? "backing.raw" : nil
        var values = [UInt64](repeating: hasBacking ? Self.backed : 0, count: sectorCount)
        for cluster in 0..<guestClusters {
            let sectors = cluster * sectorsPerCluster..<(cluster + 1) * sectorsPerCluster
            func bytes(_ value: UInt64) -> [UInt8] {
                for sector in sectors { values[sector] = value }
                return SectorPattern.bytes(sectors: sectors, value: value)
            }
            switch cluster % 8 {
            case 1 where isExtended, 5 where isExtended:
                let bitmap = cluster % 8 == 1 ? 0 : Self.mixed
                image.write(bytes(Self.stored), guestCluster: cluster)
                image.setBitmap(bitmap, guestCluster: cluster)
                for sector in sectors {
                    let index = UInt64((sector - sectors.lowerBound) * 32 / sectorsPerCluster)
                    if bitmap >> index & 1 == 1 { continue }
                    values[sector] =
                        bitmap >> (index + 32) & 1 == 1 || !hasBacking ? 0 : Self.backed
                }
            case 0, 5: image.write(bytes(Self.stored), guestCluster: cluster)
            case _ where isFull: image.write(bytes(Self.stored), guestCluster: cluster)
            case 2 where hasCompressed, 3 where hasCompressed:
                image.compress(bytes(Self.compressed), guestCluster: cluster)
            case 6 where version == 3:
                _ = bytes(0)
                image.zero(guestCluster: cluster)
            case 7 where version == 3:
                image.write(bytes(Self.stored), guestCluster: cluster)
                image.keepSpaceOnly(guestCluster: cluster)
                _ = bytes(0)
            default: break
            }
        }
        if hasSnapshot { image.snapshot("kept") }
        addBitmaps(to: &image)
        return (image.build(), values)
    }

    func addBitmaps(to image: inout ImageBuilder) {
        guard hasBitmaps else { return }
        if headerFill > 0 {
            image.extensions = [(0x1234_5678, [UInt8](repeating: 7, count: headerFill))]
        }
        image.bitmap("backup", granularityBits: 12, bits: [0x0f])
        image.bitmap("fine", granularityBits: 9)
        image.bitmap("old", granularityBits: 13, flags: 0, bits: [0x05])
    }

    /// The backing file's bytes, all of them of the right sectors.
    func backing() -> [Image.Backing] {
        guard hasBacking else { return [] }
        let bytes = SectorPattern.bytes(sectors: 0..<sectorCount, value: Self.backed)
        return [.raw(RecordingDevice(bytes, name: "backing.raw", yielding: false))]
    }

    /// Every cluster size with every width of counts that a snapshot allows somewhere among them.
    static let all: [CrashLayout] = [
        CrashLayout(clusterBits: 9, refcountOrder: 1, guestClusters: 192),
        CrashLayout(clusterBits: 9, guestClusters: 192, hasBacking: true, commitInterval: 2),
        CrashLayout(clusterBits: 9, refcountOrder: 6, guestClusters: 192, hasCompressed: true),
        CrashLayout(version: 2, clusterBits: 9, guestClusters: 192, commitInterval: 3),
        CrashLayout(
            version: 2, clusterBits: 9, guestClusters: 192, hasSnapshot: false, hasBacking: true),
        CrashLayout(clusterBits: 9, refcountOrder: 0, guestClusters: 192, hasSnapshot: false),
        // One table of the refcounts is nearly used up.
        CrashLayout(
            clusterBits: 9, refcountOrder: 6, guestClusters: 3600, hasSnapshot: false,
            isFull: true),
        CrashLayout(clusterBits: 10, refcountOrder: 5, guestClusters: 128, hasBacking: true),
        CrashLayout(clusterBits: 11, refcountOrder: 3, guestClusters: 96, hasCompressed: true),
        CrashLayout(clusterBits: 12, refcountOrder: 2, guestClusters: 64, hasBacking: true),
        CrashLayout(
            clusterBits: 12, refcountOrder: 3, guestClusters: 64, hasCompressed: true,
            commitInterval: 2),
        CrashLayout(version: 2, clusterBits: 12, guestClusters: 64, hasBacking: true),
        CrashLayout(
            clusterBits: 12, refcountOrder: 5, guestClusters: 64, hasBacking: true,
            hasCompressed: true),
        CrashLayout(clusterBits: 13, guestClusters: 48, hasBacking: true, hasCompressed: true),
        CrashLayout(clusterBits: 15, refcountOrder: 5, guestClusters: 16, commitInterval: 2),
        CrashLayout(clusterBits: 16, guestClusters: 12, hasBacking: true),
        CrashLayout(clusterBits: 16, refcountOrder: 6, guestClusters: 12, hasCompressed: true),
    ]

    static let withSubclusters: [CrashLayout] = [
        CrashLayout(clusterBits: 14, guestClusters: 24, hasBacking: true, isExtended: true),
        CrashLayout(
            clusterBits: 14, refcountOrder: 3, guestClusters: 24, hasCompressed: true,
            isExtended: true, commitInterval: 2),
        CrashLayout(
            clusterBits: 14, refcountOrder: 0, guestClusters: 24, hasSnapshot: false,
            hasBacking: true, isExtended: true),
        CrashLayout(
            clusterBits: 16, guestClusters: 8, hasBacking: true, isExtended: true,
            commitInterval: 3),
    ]

    /// The bitmaps' extension in the header's first sector, in the second, and in both.
    static let withBitmaps: [CrashLayout] = [
        CrashLayout(clusterBits: 9, guestClusters: 192, hasBitmaps: true),
        CrashLayout(
            clusterBits: 12, guestClusters: 48, hasSnapshot: false, hasBacking: true,
            hasBitmaps: true, headerFill: 384),
        CrashLayout(
            clusterBits: 12, refcountOrder: 3, guestClusters: 48, hasCompressed: true,
            hasBitmaps: true, headerFill: 376, commitInterval: 2),
        CrashLayout(clusterBits: 14, guestClusters: 24, isExtended: true, hasBitmaps: true),
    ]
}
