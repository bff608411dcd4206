/// A whole disk to read: a qcow2 image with its chain, or the bytes of a device.
///
/// Offsets and counts are bytes of the disk.  Any method may be called from any thread.
public struct SourceDisk: Sendable {
    /// How the file that holds a disk is to be understood.
    public enum Format: String, Sendable {
        /// The bytes of the file are those of the disk.
        case raw
        /// The file is an image.
        case qcow2
    }

    private enum Content: Sendable {
        case image(Image)
        case device(any BlockDevice)
        case piped(PipedImage)
    }

    private let content: Content
    /// Bytes of the disk.
    public let size: UInt64

    /// The disk that `image` holds.
    public init(_ image: Image) {
        content = .image(image)
        size = image.size
    }

    init(_ piped: PipedImage) {
        content = .piped(piped)
        size = piped.image.size
    }

    /// The bytes of `device`.
    /// - Throws: `.system` where the device does not say how long it is.
    public init(_ device: any BlockDevice) throws(ImageError) {
        content = .device(device)
        do throws(SystemError) {
            size = try device.byteCount()
        } catch {
            throw ImageError(.system(error, operation: "cannot find the length"), file: device.name)
        }
    }

    /// Opens the file at `path` read-only.
    ///
    /// - Parameters:
    ///   - path: Where the file is.
    ///   - options: How an image is opened, to be read.
    ///   - format: nil takes a file with the qcow2 magic for an image, all others for raw.
    ///   - snapshot: The internal snapshot, by identifier or name, that is meant instead.
    /// - Throws: What `Image.open` throws; `.locked` where a program writes to the file.
    public init(
        path: String, format: Format? = nil, snapshot: String? = nil,
        options: OpenOptions = OpenOptions(access: .readOnly)
    ) throws(ImageError) {
        let isImage =
            switch format {
            case .qcow2: true
            case .raw: false
            case nil: try Self.hasMagic(path)
            }
        var options = options
        options.access = .readOnly
        if let snapshot {
            self.init(try Image.openSnapshot(snapshot, ofImageAt: path, options: options))
        } else if isImage {
            self.init(try Image.open(path, options: options))
        } else {
            let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
            do throws(ImageError) {
                try ImageLock.take(
                    options.locking == .forceShare ? .forceShare : .reader, on: device)
                try self.init(device)
            } catch {
                device.close()
                throw error
            }
        }
    }

    private static func hasMagic(_ path: String) throws(ImageError) -> Bool {
        let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        defer { device.close() }
        do throws(SystemError) {
            return try device.hasMagic()
        } catch {
            throw ImageError(.system(error, operation: "cannot read"), file: path)
        }
    }

    /// The image, nil for a raw disk.
    public var image: Image? {
        switch content {
        case .image(let image): image
        case .piped(let piped): piped.image
        case .device: nil
        }
    }

    /// Whether it comes through a pipe and can be read only once, from front to back.
    public var isSequential: Bool {
        if case .piped = content { return true }
        return false
    }

    /// What a message calls the disk: a path, mostly.
    public var name: String {
        switch content {
        case .image(let image): image.files.first ?? ""
        case .device(let device): device.name
        case .piped(let piped): piped.image.files.first ?? ""
        }
    }

    /// Fills `buffer` from `offset` on.
    /// - Throws: what `Image.read` throws; `.invalidArgument` past the end.
    public func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(ImageError) {
        switch content {
        case .image(let image): try image.read(into: buffer, at: offset)
        case .piped(let piped): try piped.read(into: buffer, at: offset)
        case .device(let device):
            do throws(SystemError) {
                try device.readPadded(into: buffer, at: offset)
            } catch {
                throw ImageError(
                    .system(error, operation: "cannot read at \(offset)"), file: device.name)
            }
        }
    }

    /// Whether the bytes from `offset` on are a hole, which reads as zeros, and for how many of
    /// them, at most `limit`, that holds.
    /// - Throws: What `Image.read` throws.
    public func run(
        at offset: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        switch content {
        case .image(let image): return try image.holeOrData(at: offset, limit: limit)
        case .piped(let piped): return try piped.run(at: offset, limit: limit)
        case .device(let device):
            do throws(SystemError) {
                return try device.holeOrData(at: offset, limit: limit)
            } catch {
                throw ImageError(
                    .system(error, operation: "looking for holes"), file: device.name)
            }
        }
    }

    /// Where the bytes from `offset` on, at most `limit` of them, lie as they are; nil for what is
    /// in no file, or not as the disk has it.
    func place(at offset: UInt64, limit: UInt64) throws(ImageError) -> BytePlace? {
        switch content {
        case .image(let image): return try image.place(at: offset, limit: limit)
        case .piped: return nil
        case .device(let device):
            guard let file = device as? FileDevice else { return nil }
            return BytePlace(file: file, offset: offset, byteCount: min(limit, size &- offset))
        }
    }

    /// Reads what a pipe still brings, once everything that is wanted of it was read.
    /// - Throws: `.corrupt` where it has ended before the image.
    func finish() throws(ImageError) {
        if case .piped(let piped) = content { try piped.finish() }
    }

    /// Closes the image or the device.
    /// - Throws: What `Image.close` throws; everything is closed all the same.
    public func close() throws(ImageError) {
        switch content {
        case .image(let image): try image.close()
        case .device(let device): device.close()
        case .piped(let piped): try piped.image.close()
        }
    }
}
