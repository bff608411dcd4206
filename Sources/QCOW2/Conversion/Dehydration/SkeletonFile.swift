/// The file that a dehydrated image is kept in: runs of its bytes, ascending, zeros left out.
///
/// | offset | bytes | field                                                        |
/// |--------|-------|--------------------------------------------------------------|
/// | 0      | 8     | `QFSBONES`                                                   |
/// | 8      | 4     | version, 1                                                   |
/// | 12     | 4     | flags; bit 0: names are redacted                             |
/// | 16     | 8     | bytes of the image's file                                    |
/// | 24     |       | runs: offset (8), bytes (4), bytes stored (4), and the bytes |
/// |        | 16    | the end: all ones, 0, number of runs                         |
///
/// Numbers are big-endian.  A run has at most 65536 bytes; where fewer are stored they are a raw
/// deflate stream of it.
enum SkeletonFile {
    static let magic: [UInt8] = Array("QFSBONES".utf8)
    static let version: UInt32 = 1
    static let headerByteCount = 24
    static let runByteCount = 65536
    static let recordByteCount = 16

    /// Writes runs one after the other.
    struct Writer: ~Copyable {
        private let device: any BlockDevice
        private let compressor = Compressor(.deflate)
        private let stream = UnsafeMutableRawBufferPointer.allocate(
            byteCount: SkeletonFile.runByteCount, alignment: 16)
        private var runCount: UInt32 = 0
        private(set) var byteCount: UInt64 = 0

        init(_ device: any BlockDevice, imageByteCount: UInt64, redactsNames: Bool)
            throws(ImageError)
        {
            self.device = device
            var header = SkeletonFile.magic + [UInt8](repeating: 0, count: 16)
            header.storeBigEndian(SkeletonFile.version, at: 8)
            header.storeBigEndian(UInt32(redactsNames ? 1 : 0), at: 12)
            header.storeBigEndian(imageByteCount, at: 16)
            try append(header)
        }

        deinit { stream.deallocate() }

        /// Appends the run at `offset` of the image; `bytes` are at most a run's.
        mutating func add(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
            if bytes.isEmpty || ZeroScan.isZero(bytes) { return }
            let count = compressor.compress(bytes, into: stream)
            try appendRecord(offset, UInt32(bytes.count), UInt32(count ?? bytes.count))
            try append(count.map { UnsafeRawBufferPointer(rebasing: stream[..<$0]) } ?? bytes)
            runCount += 1
        }

        mutating func finish() throws(ImageError) { try appendRecord(.max, 0, runCount) }

        private mutating func appendRecord(
            _ offset: UInt64, _ byteCount: UInt32, _ storedByteCount: UInt32
        ) throws(ImageError) {
            var record = [UInt8](repeating: 0, count: SkeletonFile.recordByteCount)
            record.storeBigEndian(offset, at: 0)
            record.storeBigEndian(byteCount, at: 8)
            record.storeBigEndian(storedByteCount, at: 12)
            try append(record)
        }

        private mutating func append(_ bytes: [UInt8]) throws(ImageError) {
            try bytes.span.withUnsafeBytes { bytes throws(ImageError) in try append(bytes) }
        }

        private mutating func append(_ bytes: UnsafeRawBufferPointer) throws(ImageError) {
            do throws(SystemError) {
                try device.write(bytes, at: byteCount)
            } catch {
                throw ImageError(.system(error, operation: "cannot write"), file: device.name)
            }
            byteCount += UInt64(bytes.count)
        }
    }

    /// Reads runs one after the other, and judges them.
    struct Reader: ~Copyable {
        let imageByteCount: UInt64
        private let device: any BlockDevice
        private let decompressor = Decompressor(.deflate)
        private var place = UInt64(SkeletonFile.headerByteCount)
        /// Where the last run ended in the image.
        private var end: UInt64 = 0
        private var runCount: UInt32 = 0

        init(_ device: any BlockDevice) throws(ImageError) {
            self.device = device
            let header = try Self.read(SkeletonFile.headerByteCount, at: 0, of: device)
            guard header.starts(with: SkeletonFile.magic) else {
                throw Self.fault("is no dehydrated image", device)
            }
            let (version, count) = header.withUnsafeBytes {
                ($0.bigEndian(at: 8, as: UInt32.self), $0.bigEndian(at: 16, as: UInt64.self))
            }
            guard version == SkeletonFile.version else {
                throw Self.fault(
                    "is a dehydrated image of version \(version ?? 0), only 1 is known", device)
            }
            imageByteCount = count ?? 0
        }

        /// Calls `body` with every run.
        mutating func forEachRun(
            _ body: (UnsafeRawBufferPointer, _ offset: UInt64) throws(ImageError) -> Void
        ) throws(ImageError) {
            while let (offset, byteCount, storedByteCount) = try nextRecord() {
                let stored = try Self.read(storedByteCount, at: place, of: device)
                place += UInt64(storedByteCount)
                var bytes = stored
                if storedByteCount < byteCount {
                    bytes = [UInt8](repeating: 0, count: byteCount)
                    try inflate(stored, into: &bytes)
                }
                try bytes.withRawBytes { bytes throws(ImageError) in try body(bytes, offset) }
                runCount += 1
            }
        }

        private func inflate(_ stored: [UInt8], into bytes: inout [UInt8]) throws(ImageError) {
            do throws(DecompressionError) {
                try stored.withRawBytes { stream throws(DecompressionError) in
                    try bytes.withMutableRawBytes { bytes throws(DecompressionError) in
                        try decompressor.decompress(stream, into: bytes)
                    }
                }
            } catch {
                throw Self.fault("is damaged at \(hex(place)): \(error)", device)
            }
        }

        private mutating func nextRecord() throws(ImageError) -> (UInt64, Int, Int)? {
            let record = try Self.read(SkeletonFile.recordByteCount, at: place, of: device)
            place += UInt64(SkeletonFile.recordByteCount)
            let (offset, byteCount, storedByteCount) = record.withUnsafeBytes {
                (
                    $0.bigEndian(at: 0, as: UInt64.self) ?? 0,
                    Int($0.bigEndian(at: 8, as: UInt32.self) ?? 0),
                    Int($0.bigEndian(at: 12, as: UInt32.self) ?? 0)
                )
            }
            if offset == .max {
                guard storedByteCount == Int(runCount) else {
                    throw Self.fault("is damaged: a run is missing", device)
                }
                return nil
            }
            guard (1...SkeletonFile.runByteCount).contains(byteCount),
                (1...byteCount).contains(storedByteCount), offset >= end,
                offset <= imageByteCount, UInt64(byteCount) <= imageByteCount - offset
            else { throw Self.fault("is damaged at \(hex(place))", device) }
            end = offset + UInt64(byteCount)
            return (offset, byteCount, storedByteCount)
        }

        private static func read(
            _ count: Int, at offset: UInt64, of device: any BlockDevice
        ) throws(ImageError) -> [UInt8] {
            let bytes = try Header.read(count, at: offset, of: device)
            guard bytes.count == count else {
                throw fault(
                    offset == 0 ? "is no dehydrated image" : "is cut short at \(hex(offset))",
                    device)
            }
            return bytes
        }

        private static func fault(_ words: String, _ device: any BlockDevice) -> ImageError {
            ImageError(.corrupt(words), file: device.name)
        }
    }
}
