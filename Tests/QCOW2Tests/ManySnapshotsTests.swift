import Foundation
import QCOW2
import TestSupport
import Testing

/// As many snapshots as an image may have.
@Suite("65,536 snapshots", .serialized)
struct ManySnapshotsTests {
    /// One image for all tests: a cluster of data that every snapshot shares.
    private static let image: [UInt8] = {
        var builder = ImageBuilder(byteCount: 16.KiB, clusterBits: 9, refcountOrder: 5)
        builder.fill(0x11, guestCluster: 3)
        for number in 0..<65536 { builder.snapshot("s\(number)") }
        return builder.build()
    }()

    @discardableResult
    private func within<Result>(
        _ seconds: Double, _ words: String, _ body: () throws -> Result
    ) throws -> Result {
        let start = Date()
        let result = try body()
        let taken = Date().timeIntervalSince(start)
        #expect(taken < seconds, "\(words) took \(taken) s")
        print("• 65,536 snapshots: \(words) took \(Int(taken * 1000)) ms")
        return result
    }

    @Test("Trap 56: they are listed, checked and read in bounded time")
    func limit() throws {
        let device = RecordingDevice(Self.image, yielding: false)
        let image = try within(10, "opening") { try Image.open(device, options: .readOnly) }
        let list = try within(10, "listing") { try image.snapshots() }
        #expect(list.count == 65536 && list.last?.name == "s65535" && list.last?.id == "65536")
        let view = try within(10, "opening one") { try image.openSnapshot("s40000") }
        #expect(try view.bytes(3 * 512..<4 * 512).allSatisfy { $0 == 0x11 })
        try view.close()
        try image.close()
        let check = try within(10, "checking") { try ImageCheck(device) }
        #expect(check.corruptionCount == 0 && check.leakCount == 0 && check.errorCount == 0)
    }

    @Test("One more is refused by a sentence, and there is room again when one is gone")
    func oneMore() throws {
        let device = RecordingDevice(Self.image, yielding: false)
        let image = try within(10, "opening for writing") { try Image.open(device) }
        #expect {
            try image.createSnapshot("one too many")
        } throws: {
            "\($0)".contains("65536 snapshots")
        }
        try image.write([UInt8](repeating: 0x22, count: 512), at: 3 * 512)
        try within(10, "deleting one") { try image.deleteSnapshot("s7") }
        try within(10, "making one") { try image.createSnapshot("new") }
        #expect(try image.snapshots().count == 65536)
        try within(10, "applying one") { try image.applySnapshot("s65535") }
        #expect(try image.bytes(3 * 512..<4 * 512).allSatisfy { $0 == 0x11 })
        try image.close()
        let faults = try device.bytes.withUnsafeBytes { try ReferenceReader($0).audit().faults }
        #expect(faults == [])
    }

    @Test("A table of one more is refused when the image is opened")
    func tooMany() throws {
        var bytes = Self.image
        bytes.put(UInt32(65537), at: 60)
        #expect(throws: ImageError.self) { try Image.open(bytes: bytes, options: .readOnly) }
    }
}
