import QCOW2
import TestSupport
import Testing

/// A new header and what stands behind it, in a first cluster of 1 KiB: 112 bytes, 16 for the
/// backing file's format, the end marker's 8, and the backing file's name.
@Suite("Replacing a header")
struct HeaderRewriteTests {
    private func image(headerEnd: Int) -> [UInt8] {
        var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 10)
        builder.extensions = [(0xE279_2ACA, Array("raw".utf8))]
        builder.backingName = String(repeating: "b", count: headerEnd - 136)
        return builder.build()
    }

    private func amend(headerEnd: Int, to end: Int) throws -> RecordingDevice {
        let device = RecordingDevice(image(headerEnd: headerEnd), yielding: false)
        var options = AmendOptions()
        options.backingFile = String(repeating: "n", count: end - 136)
        try Image.amend(on: device, options: options)
        let header = try device.bytes.withUnsafeBytes { try Header.parse($0) }
        #expect(header.backingFile == options.backingFile)
        return device
    }

    private func writes(_ device: RecordingDevice) -> [Int] {
        device.moments.compactMap { if case .write(_, let offset, _) = $0 { offset } else { nil } }
    }

    @Test("Where the old one has the first sector alone, the rest is there before that sector")
    func longer() throws {
        #expect(try writes(amend(headerEnd: 512, to: 600)).prefix(2) == [512, 0])
    }

    @Test("Where it has more, the new rest needs room beside it")
    func noRoom() {
        #expect {
            try amend(headerEnd: 513, to: 600)
        } throws: { "\($0)".contains("no room to change the header safely") }
    }

    @Test("What is left of a longer one is gone for good", arguments: [512, 513, 900])
    func leftovers(headerEnd: Int) throws {
        let device = try amend(headerEnd: headerEnd, to: 200)
        #expect(device.bytes[200..<1024].allSatisfy { $0 == 0 })
        guard case .flushed = device.moments.last else {
            Issue.record("\(String(describing: device.moments.last)) came last")
            return
        }
    }
}
