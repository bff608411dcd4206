extension Header {
    /// Reads and judges the header of the image on `device`.  What the image needs beyond this
    /// version's abilities is not judged, except its version and compression type.
    /// - Throws: `.notQCOW2`, `.malformed`, `.unsupported`, `.system`.
    package static func read(from device: any BlockDevice) throws(ImageError) -> Header {
        let start = try read(512, at: 0, of: device)
        let needed = try judge(start, device) { bytes throws(FormatError) in
            // Version 1 is another format, in which no other field means the same.
            if let version = bytes.bigEndian(at: 4, as: UInt32.self),
                bytes.bigEndian(at: 0, as: UInt32.self) == magic, version != 2, version != 3
            {
                throw .outOfRange("version", value: UInt64(version), allowed: "2 and 3")
            }
            return try neededByteCount(bytes)
        }
        let cluster = try read(needed, at: 0, of: device)
        return try judge(cluster, device) { bytes throws(FormatError) in try parse(bytes) }
    }

    private static func judge<Result>(
        _ bytes: [UInt8], _ device: any BlockDevice,
        _ body: (UnsafeRawBufferPointer) throws(FormatError) -> Result
    ) throws(ImageError) -> Result {
        do throws(FormatError) {
            return try bytes.withRawBytes { bytes throws(FormatError) in try body(bytes) }
        } catch {
            throw ImageError(refusal(for: error), file: device.name)
        }
    }

    /// A version or compression type that we do not know is no damage but a lack of ours.
    private static func refusal(for error: FormatError) -> ImageError.Kind {
        switch error {
        case .notQCOW2: .notQCOW2
        case .outOfRange("version", let value, _): .unsupported(.version(UInt32(clamping: value)))
        case .outOfRange("compression_type", let value, _):
            .unsupported(.compressionType(UInt8(clamping: value)))
        default: .malformed(error)
        }
    }
}
