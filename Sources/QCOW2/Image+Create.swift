extension Image {
    /// Makes an empty image on a device, whose content is lost.
    ///
    /// The header is written last, when everything else is on stable storage: a device on which
    /// this was interrupted holds no image.
    /// - Parameters:
    ///   - device: What the image is made on.
    ///   - options: What it is like.
    ///   - size: Bytes of the virtual disk, rounded up to a multiple of 512.
    ///   - dataFile: Where guest data shall lie if the options name an external data file.
    /// - Throws: `.invalidArgument` or `.unsupported` before anything is written, `.system` where
    ///   a device fails.
    public static func create(
        on device: any BlockDevice, size: UInt64, options: CreateOptions = CreateOptions(),
        dataFile: (any BlockDevice)? = nil
    ) throws(ImageError) {
        try options.check(file: device.name)
        let size = try roundedUp(size, file: device.name)
        let layout = try CreationLayout(size: size, options: options, file: device.name)
        guard (options.dataFile == nil) == (dataFile == nil) else {
            throw ImageError(
                .invalidArgument("the data file's name and its device go together"),
                file: device.name)
        }
        try ImageCreation(
            device: device, data: dataFile, size: size, layout: layout, options: options
        ).run()
    }

    /// Makes an empty image in a file, with its external data file where the options name one, and
    /// replaces files that are there by the complete new ones.
    ///
    /// - Parameters:
    ///   - path: What the image is called.
    ///   - options: What it is like.
    ///   - size: Bytes of the virtual disk, rounded up to a multiple of 512; nil takes the
    ///     backing file's.
    /// - Throws: `.locked` where a program uses the file that is there, and what `create(on:)`
    ///   throws; the file is then what it was.
    public static func create(
        at path: String, size: UInt64?, options: CreateOptions = CreateOptions()
    ) throws(ImageError) {
        try options.check(file: path)
        let backingSize = try backingByteCount(of: options, imagePath: path)
        guard let size = size ?? backingSize else {
            throw ImageError(.invalidArgument("a new image needs a size"), file: path)
        }
        let rounded = try roundedUp(size, file: path)
        // Refused before the file that is there is touched.
        let layout = try CreationLayout(size: rounded, options: options, file: path)
        let files = try NewImageFiles(at: path, options)
        try ImageCreation(
            device: files.device, data: files.dataDevice, size: rounded, layout: layout,
            options: options
        ).run()
        try files.commit()
    }

    private static func roundedUp(_ size: UInt64, file: String) throws(ImageError) -> UInt64 {
        guard size <= Limits.virtualByteCount else {
            throw ImageError(
                .invalidArgument("a disk has at most \(Limits.virtualByteCount) bytes"), file: file)
        }
        return (size + 511) & ~511
    }

    /// Opens the backing file to see that it is there and is what it should be.
    private static func backingByteCount(
        of options: CreateOptions, imagePath: String
    ) throws(ImageError) -> UInt64? {
        guard options.opensBackingFile, let reference = options.backingFile else { return nil }
        guard !BackingResolver.hasScheme(reference) else {
            throw ImageError(
                .backing("the backing file \(reference) is not a plain local path"), file: imagePath
            )
        }
        let location = BackingResolver.location(of: reference, from: imagePath)
        let device = try FileDevice(path: location, access: .readOnly, mapsBytes: false)
        defer { device.close() }
        if FileDevice.Identity(ofFileAt: imagePath) == device.identity {
            throw ImageError(.backing("an image cannot be its own backing file"), file: imagePath)
        }
        try ImageLock.take(.reader, on: device)
        if options.backingFormat == BackingResolver.Format.qcow2.rawValue {
            return try Header.read(from: device).virtualByteCount
        }
        do throws(SystemError) {
            return try device.byteCount()
        } catch {
            throw ImageError(.system(error, operation: "cannot find the length"), file: location)
        }
    }
}
