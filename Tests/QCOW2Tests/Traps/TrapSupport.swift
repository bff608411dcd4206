import QCOW2
import TestSupport
import Testing

/// Expects an image in which counts, references and COPIED flags agree, both as the tests' own
/// reader and as the engine's check see it.
func expectSound(
    _ device: RecordingDevice, leaks: Int = 0, _ words: String = "",
    sourceLocation: SourceLocation = #_sourceLocation
) throws {
    let audit = try device.bytes.withUnsafeBytes { try ReferenceReader($0).audit() }
    #expect(audit.faults == [], "\(words)", sourceLocation: sourceLocation)
    #expect(audit.leakCount == leaks, "\(words)", sourceLocation: sourceLocation)
    var findings: [String] = []
    let check = try ImageCheck(device) { findings.append($0.description) }
    #expect(
        check.corruptionCount == 0 && check.leakCount == leaks, "\(words) \(findings)",
        sourceLocation: sourceLocation)
}

/// Opens the image on `device` for as long as `body` runs.
func opened(_ device: RecordingDevice, _ body: (Image) throws -> Void) throws {
    let image = try Image.open(device)
    try body(image)
    try image.close()
}

/// An image of which every other cluster is filled.
func filled(_ byteCount: Int, clusterBits: Int, refcountOrder: Int = 4) -> ImageBuilder {
    var builder = ImageBuilder(
        byteCount: byteCount, clusterBits: clusterBits, refcountOrder: refcountOrder)
    for cluster in stride(from: 0, to: builder.guestClusterCount, by: 2) {
        builder.fill(UInt8(cluster & 0x7F) + 1, guestCluster: cluster)
    }
    return builder
}

/// A raw disk full of one byte, to lie below an image.
func rawDisk(_ byte: UInt8, _ count: Int) -> Image.Backing {
    .raw(
        RecordingDevice([UInt8](repeating: byte, count: count), name: "base.raw", yielding: false))
}

/// Whether the guest bytes of `range` are all `byte`.
func reads(_ image: Image, _ range: Range<Int>, _ byte: UInt8) throws -> Bool {
    try image.bytes(range).allSatisfy { $0 == byte }
}

/// What every way to open an image says of `bytes`: for reading, for writing, for a check and for
/// a description; nil from one that lets them in.
func refusals(of bytes: [UInt8]) -> [ImageError.Kind?] {
    func refusal(_ open: (RecordingDevice) throws(ImageError) -> Void) -> ImageError.Kind? {
        do throws(ImageError) {
            try open(RecordingDevice(bytes, yielding: false))
            return nil
        } catch { return error.kind }
    }
    return [
        refusal { (device) throws(ImageError) in
            try Image.open(device, options: .readOnly).close()
        },
        refusal { (device) throws(ImageError) in try Image.open(device).close() },
        refusal { (device) throws(ImageError) in _ = try ImageCheck(device) },
        refusal { (device) throws(ImageError) in _ = try Header.read(from: device) },
    ]
}

extension ImageError.Kind {
    var isMalformed: Bool { if case .malformed = self { true } else { false } }
}

extension [UInt8] {
    /// Appends host bytes behind everything else of a small image with 16-bit counts, gives each
    /// of their clusters a count of 1, and says where they start.
    mutating func appendCounted(_ content: [UInt8], clusterBits: Int) -> Int {
        let cluster = 1 << clusterBits
        let start = (count + cluster - 1) / cluster * cluster
        let table = Int(number(at: 48, as: UInt64.self))
        let block = Int(number(at: table, as: UInt64.self))
        for index in start >> clusterBits...(start + content.count - 1) >> clusterBits {
            put(UInt16(1), at: block + index * 2)
        }
        put(content, at: start)
        return start
    }
}
