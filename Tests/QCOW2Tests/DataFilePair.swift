import QCOW2
import TestSupport
import Testing

/// An image and its data file, both empty, on devices in memory.
struct DataFilePair {
    let image = RecordingDevice([], name: "disk.qcow2", yielding: false)
    let data = RecordingDevice([], name: "disk.raw", yielding: false)

    init(_ byteCount: Int = 1.MiB, raw: Bool, clusterSize: UInt64 = 65536) throws {
        var options = CreateOptions()
        options.dataFile = "disk.raw"
        options.dataFileIsRaw = raw
        options.clusterByteCount = clusterSize
        try Image.create(on: image, size: UInt64(byteCount), options: options, dataFile: data)
    }

    func open(_ options: OpenOptions = OpenOptions()) throws -> Image {
        try Image.open(image, dataFile: data, options: options)
    }

    /// Judges the image with the tests' own reader.
    func judge<Result>(_ body: (ReferenceReader) throws -> Result) throws -> Result {
        let (image, data) = (image.bytes, data.bytes)
        return try image.withUnsafeBytes { image in
            try data.withUnsafeBytes { data in
                let reader = try ReferenceReader(image, dataFile: data)
                let audit = reader.audit()
                #expect(audit.faults == [] && audit.leakCount == 0)
                return try body(reader)
            }
        }
    }

    func bytes(_ range: Range<Int>) throws -> [UInt8] {
        try judge { (reader) throws in try reader.read(range) }
    }

    func entry(_ cluster: Int) throws -> UInt64 {
        try judge { try $0.rawEntry(forGuestCluster: cluster, in: $0.active) }
    }
}
