/// Makes an image of what `Dehydration` has kept: the same tables at the same places, in a sparse
/// file of the same length, and zeros where guest data was.
///
/// Compressed clusters lose their streams: they cannot be read.
public enum Rehydration {
    /// Makes the image of the file at `path` in a new file at `target`, which takes its place when
    /// it is complete.
    /// - Throws: `.corrupt` for a file that holds no such image, `.locked`, `.system`.
    public static func run(path: String, toImageAt target: String) throws(ImageError) {
        let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        defer { device.close() }
        var reader = try SkeletonFile.Reader(device)
        let file = try FileReplacement(of: target)
        try run(&reader, to: file.device)
        try file.commit()
    }

    /// Makes the image that `source` has on `target`, whose content is lost.
    /// - Throws: `.corrupt` for what `Dehydration` has not made, and `.system`.
    public static func run(
        _ source: any BlockDevice, to target: any BlockDevice
    ) throws(ImageError) {
        var reader = try SkeletonFile.Reader(source)
        try run(&reader, to: target)
    }

    private static func run(
        _ reader: inout SkeletonFile.Reader, to target: any BlockDevice
    ) throws(ImageError) {
        let sink = try RawSink(target, size: reader.imageByteCount, keepsZeros: false)
        try reader.forEachRun { bytes, offset throws(ImageError) in
            try sink.write(bytes, at: offset)
        }
    }
}
