/// What an image says of itself.
public struct ImageInfo: Sendable {
    /// What a file is.
    public enum Format: String, Sendable {
        /// An image.
        case qcow2
        /// The bytes of a disk.
        case raw
    }

    /// The path as it was given.
    public var path: String
    /// What the file is.
    public var format: Format
    /// Bytes of the virtual disk.
    public var virtualByteCount: UInt64
    /// Bytes that the file takes on its disk.
    public var allocatedByteCount: UInt64
    /// Nil for a raw file.
    public var header: Header?
    /// The internal snapshots, in the table's order.
    public var snapshots: [Snapshot] = []
    /// The persistent bitmaps, in the directory's order.
    public var bitmaps: [BitmapEntry] = []
    /// Nil without LUKS encryption.
    public var luks: LUKSHeader?

    /// Where the backing file is looked for; nil without one.
    public var backingPath: String? {
        header?.backingFile.map { name in
            BackingResolver.hasScheme(name)
                ? name : BackingResolver.location(of: name, from: path)
        }
    }

    /// Reads the image at `path`, and opens no other file.
    /// - Throws: `.notQCOW2`, `.malformed`, `.unsupported` for what nobody knows, `.locked`.
    public init(path: String, locking: OpenOptions.Locking = .required) throws(ImageError) {
        let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        defer { device.close() }
        if locking == .required { try ImageLock.take(.reader, on: device) }
        let header = try Header.read(from: device)
        let unknown = header.unknownIncompatibleFeatures
        guard unknown.names.isEmpty && unknown.bits == 0 else {
            throw ImageError(
                .unsupported(.unknownIncompatible(names: unknown.names, bits: unknown.bits)),
                file: path)
        }
        self.path = path
        format = .qcow2
        virtualByteCount = header.virtualByteCount
        allocatedByteCount = try Self.allocatedByteCount(of: device)
        self.header = header
        snapshots = try header.readSnapshots(from: device).snapshots
        bitmaps = try header.readBitmaps(from: device)
        if header.encryption != nil { luks = try LUKSVolume.header(of: header, in: device) }
    }

    /// A raw file, about which there is nothing to read.
    private init(rawFileAt path: String, locking: OpenOptions.Locking) throws(ImageError) {
        let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        defer { device.close() }
        if locking == .required { try ImageLock.take(.reader, on: device) }
        self.path = path
        format = .raw
        header = nil
        do throws(SystemError) {
            // As QEMU shows such a disk: the last sector is filled up with zeros.
            let byteCount = try device.byteCount()
            virtualByteCount = min(byteCount, UInt64.max - 511) + 511 & ~511
        } catch {
            throw ImageError(.system(error, operation: "cannot find the length"), file: path)
        }
        allocatedByteCount = try Self.allocatedByteCount(of: device)
    }

    private static func allocatedByteCount(of device: FileDevice) throws(ImageError) -> UInt64 {
        do throws(SystemError) {
            return try device.allocatedByteCount()
        } catch {
            throw ImageError(.system(error, operation: "cannot examine"), file: device.name)
        }
    }
}

extension ImageInfo {
    /// The image at `path` and every file below it, the image first.
    /// - Throws: What `init` throws, and `.denied` or `.backing` for a file that cannot be opened.
    public static func chain(
        path: String, policy: OpenPolicy = .imageDirectory,
        locking: OpenOptions.Locking = .required
    ) throws(ImageError) -> [ImageInfo] {
        let resolver = try BackingResolver(policy: policy, imagePath: path)
        var layers = [try ImageInfo(path: path, locking: locking)]
        var identities = [FileDevice.Identity(ofFileAt: path)].compactMap { $0 }
        var isProbed = false
        while let layer = layers.last, let reference = layer.header?.backingFile {
            let found = try resolver.resolve(
                reference, format: layer.header?.backingFormat, from: layer.path,
                overlayWasProbed: isProbed, chain: identities)
            layers.append(
                found.format == .qcow2
                    ? try ImageInfo(path: found.location, locking: locking)
                    : try ImageInfo(rawFileAt: found.location, locking: locking))
            identities.append(found.identity)
            isProbed = found.isProbed
        }
        return layers
    }
}
