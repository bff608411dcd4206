import QCOW2
import TestSupport
import Testing

/// Entries with reserved bits set: nobody knows what they say.
@Suite("Reserved bits")
struct ReservedBitsTests {
    enum Place: String, CaseIterable, Sendable { case l1, l2, extendedL2, zero }
    enum Operation: String, CaseIterable, Sendable { case write, zero, discard, allocate }

    /// An image of which the second guest cluster has a table's entry, or an entry of its own, with
    /// a reserved bit; guest clusters behind the first table have not.
    private func image(_ place: Place) -> (bytes: [UInt8], firstFine: Int) {
        let isExtended = place == .extendedL2
        let clusterBits = isExtended ? 14 : 9
        let perTable = (1 << clusterBits) / (isExtended ? 16 : 8)
        var builder = ImageBuilder(
            byteCount: 2 * perTable << clusterBits, clusterBits: clusterBits,
            isExtended: isExtended)
        for cluster in [0, 1, perTable] { builder.fill(0x11, guestCluster: cluster) }
        let host = builder.fill(0x22, guestCluster: 1)
        if place == .zero {
            builder.setEntry(UInt64(host) | 1 << 63 | 1 | 1 << 3, guestCluster: 1)
        } else if place != .l1 {
            builder.setEntry(UInt64(host) | 1 << 63 | 1 << 57, guestCluster: 1)
        }
        let l1Offset = builder.l1Offset
        var bytes = builder.build()
        if place == .l1 { bytes[l1Offset] |= 0x20 }
        return (bytes, perTable << clusterBits)
    }

    @Test("A reader passes over them, and changes nothing", arguments: Place.allCases)
    func reads(_ place: Place) throws {
        let (bytes, _) = image(place)
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device, options: .readOnly)
        let size = Int(image.clusterByteCount)
        #expect(try image.bytes(0..<size).allSatisfy { $0 == 0x11 })
        #expect(try image.bytes(size..<2 * size).allSatisfy { $0 == (place == .zero ? 0 : 0x22) })
        try image.close()
        #expect(device.bytes == bytes)
    }

    @Test(
        "A change fails, marks the image corrupt and ends writing", arguments: Place.allCases,
        Operation.allCases)
    func refusesChanges(_ place: Place, _ operation: Operation) throws {
        let (bytes, fine) = image(place)
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        let size = image.clusterByteCount
        let cluster = size..<2 * size
        #expect {
            switch operation {
            case .write: try image.write([7], at: Int(size) + 5)
            case .zero: try image.writeZeroes(cluster, keepingSpace: true)
            case .discard: try image.discard(cluster)
            case .allocate: try image.allocate(cluster)
            }
        } throws: {
            // EIO, with a sentence that says why.
            ($0 as? ImageError)?.code == 5 && "\($0)".contains("reserved bits")
        }
        #expect(throws: ImageError.self) { try image.write([7], at: fine) }
        #expect(try image.bytes(fine..<fine + 512).allSatisfy { $0 == 0x11 })
        try? image.close()
        #expect(device.bytes.number(at: 72, as: UInt64.self) & 2 == 2)
        let again = try Image.open(device, options: .readOnly)
        #expect(
            try again.bytes(0..<fine)
                == Image.open(bytes: bytes, options: .readOnly).bytes(0..<fine))
        try again.close()
        #expect(throws: ImageError.self) { try Image.open(device) }
    }

    @Test("What lies beside such an entry is written as ever", arguments: [Place.l2, .zero])
    func writesBeside(_ place: Place) throws {
        let (bytes, _) = image(place)
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        let size = Int(image.clusterByteCount)
        try image.write([UInt8](repeating: 0x33, count: size), at: 0)
        try image.write([UInt8](repeating: 0x44, count: size), at: 2 * size)
        try image.close()
        let again = try Image.open(device, options: .readOnly)
        #expect(try again.bytes(0..<size).allSatisfy { $0 == 0x33 })
        #expect(try again.bytes(2 * size..<3 * size).allSatisfy { $0 == 0x44 })
        try again.close()
        #expect(device.bytes.number(at: 72, as: UInt64.self) == 0)
    }
}
