import QCOW2
import TestSupport

/// Images with an external data file: both lie on one recording device, each in a part of its own,
/// so that a cut leaves any mixture of the two.
extension CrashLayout {
    /// Where the data file starts; the image has room to grow before it.
    private static let imageRoom = 192.KiB

    func buildWithDataFile() -> (image: [UInt8], values: [UInt64]) {
        var image = ImageBuilder(
            byteCount: byteCount, clusterBits: clusterBits, refcountOrder: refcountOrder)
        image.incompatibleFeatures = 4
        image.autoclearFeatures = isRaw ? 2 : 0
        image.backingName = hasBacking ? "backing.raw" : nil
        var data: [UInt8] = []
        var values = [UInt64](repeating: hasBacking ? Self.backed : 0, count: sectorCount)
        for cluster in 0..<guestClusters {
            let sectors = cluster * sectorsPerCluster..<(cluster + 1) * sectorsPerCluster
            let entry = UInt64(cluster << clusterBits) | 1 << 63
            var value: UInt64 = 0
            switch cluster % 8 {
            case 0, 5:
                image.setEntry(entry, guestCluster: cluster)
                value = Self.stored
            case _ where isRaw: image.setEntry(entry, guestCluster: cluster)
            case 6: image.zero(guestCluster: cluster)
            case 7: image.setEntry(entry | 1, guestCluster: cluster)
            default:
                data += Self.leftover(sectors)
                continue
            }
            for sector in sectors { values[sector] = value }
            let isStored = value != 0 || isRaw
            data +=
                isStored
                ? SectorPattern.bytes(sectors: sectors, value: value) : Self.leftover(sectors)
        }
        addBitmaps(to: &image)
        var bytes = image.build()
        precondition(bytes.count <= Self.imageRoom, "the image is too large for its part")
        bytes.append(contentsOf: repeatElement(0, count: Self.imageRoom - bytes.count))
        return (bytes + data, values)
    }

    /// What a data file may hold where no entry shows it.
    private static func leftover(_ sectors: Range<Int>) -> [UInt8] {
        SectorPattern.bytes(sectors: sectors, value: 999)
    }

    /// Opens the image of a record; `data` is what the engine sees of the data file.
    func open(
        _ record: RecordingDevice, through device: (RecordingDevice) -> any BlockDevice = { $0 },
        data: (any BlockDevice) -> any BlockDevice = { $0 }
    ) throws -> Image {
        let image = self.device(of: record)
        guard hasDataFile else {
            return try Image.open(
                device(record), backing: backing(), options: OpenOptions(passphrases: passphrases))
        }
        let room = Self.imageRoom
        let file = RecordedPart(
            record, room..<room + byteCount, length: byteCount, name: "disk.data")
        return try Image.open(image, dataFile: data(file), backing: backing())
    }

    /// The image's file alone.
    func device(of record: RecordingDevice) -> any BlockDevice {
        guard hasDataFile else { return record }
        let room = Self.imageRoom
        return RecordedPart(record, 0..<room, length: room, name: "disk.qcow2")
    }

    /// The two files of a state that a cut left.
    func files(
        of state: UnsafeRawBufferPointer
    ) -> (image: UnsafeRawBufferPointer, data: UnsafeRawBufferPointer?) {
        guard hasDataFile else { return (state, nil) }
        let room = Self.imageRoom
        return (
            UnsafeRawBufferPointer(rebasing: state[..<room]),
            UnsafeRawBufferPointer(rebasing: state[room...])
        )
    }

    /// Data files plain and raw, over zeros and over a backing file.
    static let withDataFile: [CrashLayout] = [
        CrashLayout(clusterBits: 9, guestClusters: 192, hasSnapshot: false, hasDataFile: true),
        CrashLayout(
            clusterBits: 9, guestClusters: 192, hasSnapshot: false, hasBacking: true,
            hasDataFile: true, commitInterval: 2),
        CrashLayout(
            clusterBits: 9, guestClusters: 192, hasSnapshot: false, hasDataFile: true, isRaw: true),
        CrashLayout(
            clusterBits: 12, refcountOrder: 0, guestClusters: 64, hasSnapshot: false,
            hasBacking: true, hasDataFile: true),
        CrashLayout(
            clusterBits: 12, guestClusters: 64, hasSnapshot: false, hasDataFile: true, isRaw: true,
            hasBitmaps: true, commitInterval: 2),
    ]
}
