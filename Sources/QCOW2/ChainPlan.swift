internal import Logging

/// A file of a chain, opened and locked.
struct ChainFile: Sendable {
    let device: any BlockDevice
    /// nil for a raw disk.
    let header: Header?
    /// Where the guest data of a qcow2 image lies that has an external data file.
    var data: (any BlockDevice)?

    func close() {
        device.close()
        data?.close()
    }
}

/// The files of an image's backing chain, opened in the order in which they refer to each other.
struct ChainPlan {
    private(set) var files: [ChainFile] = []
    private let options: OpenOptions

    init(_ path: String, options: OpenOptions) throws(ImageError) {
        self.options = options
        do throws(ImageError) {
            try openAll(path)
        } catch {
            for file in files { file.close() }
            throw error
        }
    }

    private mutating func openAll(_ path: String) throws(ImageError) {
        let top = try openFile(
            path, access: options.access == .readWrite ? .readWrite : .readOnly)
        var header = try judged(top)
        files.append(ChainFile(device: top, header: header))
        guard header.backingFile != nil || header.hasDataFile else { return }
        let resolver = try BackingResolver(policy: options.policy, imagePath: path)
        var chain = [top.identity]
        var overlay = (path: path, isProbed: false)
        try openDataFile(of: header, at: path, isProbed: false, resolver, &chain)
        while let reference = header.backingFile {
            let found = try resolver.resolve(
                reference, format: header.backingFormat, from: overlay.path,
                overlayWasProbed: overlay.isProbed, chain: chain)
            if found.isProbed {
                options.logger.warning(
                    """
                    \(overlay.path) does not say the format of its backing file \(reference): \
                    taken for \(found.format.rawValue)
                    """
                )
            }
            let device = try openFile(found.path, access: .readOnly)
            guard device.identity == found.identity else {
                device.close()
                throw ImageError(
                    .backing("its backing file \(reference) was replaced"), file: overlay.path)
            }
            chain.append(device.identity)
            guard found.format == .qcow2 else {
                files.append(ChainFile(device: device, header: nil))
                return
            }
            header = try judged(device)
            files.append(ChainFile(device: device, header: header))
            overlay = (found.location, found.isProbed)
            try openDataFile(
                of: header, at: overlay.path, isProbed: overlay.isProbed, resolver, &chain)
        }
    }

    /// Opens the external data file of the last file, if it has one.
    private mutating func openDataFile(
        of header: Header, at path: String, isProbed: Bool, _ resolver: BackingResolver,
        _ chain: inout [FileDevice.Identity]
    ) throws(ImageError) {
        guard header.hasDataFile, let last = files.indices.last else { return }
        guard let reference = header.dataFileName else {
            throw ImageError(
                .dataFile("keeps its data in an external data file, which it does not name"),
                file: path)
        }
        let found = try resolver.resolveDataFile(
            reference, from: path, imageWasProbed: isProbed, chain: chain)
        let isWritable = last == 0 && options.access == .readWrite
        let device = try openFile(found.path, access: isWritable ? .readWrite : .readOnly)
        files[last].data = device
        guard device.identity == found.identity else {
            throw ImageError(.dataFile("its data file \(reference) was replaced"), file: path)
        }
        chain.append(device.identity)
    }

    private func openFile(
        _ path: String, access: FileDevice.Access
    ) throws(ImageError) -> FileDevice {
        let device = try FileDevice(
            path: path, access: access, bypassesPageCache: options.bypassesPageCache)
        do throws(ImageError) {
            try lock(device)
        } catch {
            device.close()
            throw error
        }
        return device
    }

    private func lock(_ device: FileDevice) throws(ImageError) {
        let mode: ImageLock.Mode =
            switch (options.locking, device.access) {
            case (.forceShare, .readOnly): .forceShare
            case (_, .readOnly): .reader
            case (_, .readWrite): .writer
            }
        if case .unavailable(let error) = try ImageLock.take(mode, on: device) {
            options.logger.warning(
                """
                \(device.name): the file system has no locks (\(error)): \
                nothing keeps other programs away
                """
            )
        }
    }

    /// The header; the device is closed where it is not one that can be used.
    private func judged(_ device: FileDevice) throws(ImageError) -> Header {
        do throws(ImageError) {
            return try Header.readSupported(from: device)
        } catch {
            device.close()
            throw error
        }
    }
}

extension Header {
    /// The header of the image on `device`, if everything that it asks for can be read.
    /// - Throws: `.unsupported` by name, and what `read(from:)` throws.
    static func readSupported(from device: any BlockDevice) throws(ImageError) -> Header {
        let header = try read(from: device)
        if let feature = header.unsupportedFeature {
            throw ImageError(.unsupported(feature), file: device.name)
        }
        return header
    }

    /// The first thing that this version does not read.
    private var unsupportedFeature: Feature? {
        let unknown = unknownIncompatibleFeatures
        if !unknown.names.isEmpty || unknown.bits != 0 {
            return .unknownIncompatible(names: unknown.names, bits: unknown.bits)
        }
        return nil
    }
}
