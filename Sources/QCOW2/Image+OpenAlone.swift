extension Image {
    /// Opens the image at `path` without its backing files, and without the key of its data: for
    /// what needs its metadata alone, as a change of its snapshots or bitmaps does.
    ///
    /// What the backing file holds reads as zeros, and what is encrypted cannot be read or written.
    /// - Throws: what `open` throws of the image itself.
    public static func openAlone(
        _ path: String, access: OpenOptions.Access = .readWrite
    ) throws(ImageError) -> Image {
        let isWritable = access == .readWrite
        let device = try FileDevice(
            path: path, access: isWritable ? .readWrite : .readOnly, mapsBytes: false)
        do throws(ImageError) {
            try ImageLock.take(isWritable ? .writer : .reader, on: device)
            // No guest data is read or written: an external data file may lie anywhere.
            return try Image.open(
                device, dataFile: device,
                options: OpenOptions(access: access, passphrases: .locked))
        } catch {
            device.close()
            throw error
        }
    }
}
