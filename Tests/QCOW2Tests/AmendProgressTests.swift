import QCOW2
import TestSupport
import Testing

@Suite("Progress of an amendment")
struct AmendProgressTests {
    private static func image() -> [UInt8] {
        var image = ImageBuilder(byteCount: 8.MiB, clusterBits: 9)
        for cluster in stride(from: 0, to: 16000, by: 50) {
            image.fill(1, guestCluster: cluster)
            image.zero(guestCluster: cluster + 1)
        }
        image.snapshot("kept")
        return image.build()
    }

    private static let changes: [@Sendable (inout AmendOptions) -> Void] = [
        { $0.version = .v2 }, { $0.refcountBits = 64 },
    ]

    @Test("it rises to the end", arguments: changes)
    func rises(_ change: @Sendable (inout AmendOptions) -> Void) throws {
        var options = AmendOptions()
        change(&options)
        var parts: [Double] = []
        let device = RecordingDevice(Self.image(), yielding: false)
        try Image.amend(on: device, options: options) {
            parts.append($0)
            return true
        }
        #expect(parts.count > 50 && parts == parts.sorted() && parts.last ?? 0 > 0.4)
        #expect(parts.allSatisfy { (0...1).contains($0) })
        try expectSound(device)
    }

    @Test("cancelled, it has not happened", arguments: changes, [1, 30])
    func cancelled(_ change: @Sendable (inout AmendOptions) -> Void, after count: Int) throws {
        var options = AmendOptions()
        change(&options)
        let bytes = Self.image()
        let device = RecordingDevice(bytes, yielding: false)
        var calls = 0
        let error = #expect(throws: ImageError.self) {
            try Image.amend(on: device, options: options) { _ in
                calls += 1
                return calls < count
            }
        }
        #expect(error?.kind == .cancelled)
        #expect(device.bytes == bytes)
    }
}
