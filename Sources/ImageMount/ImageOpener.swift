internal import Glibc
internal import Logging
internal import QCOW2

/// How the images of a mount are opened.
struct ImageOpener: Sendable {
    /// An absolute path.
    let path: String
    let openOptions: OpenOptions
    let rules: FileRules
    let commitInterval: Duration
    let overlay: MountOptions.Overlay?

    init(path: String, options: MountOptions, imageCount: Int) {
        self.path = path
        rules = options.rules
        commitInterval = options.commitInterval
        overlay = options.overlay
        openOptions = OpenOptions(
            access: options.isReadOnly || options.forcesShare ? .readOnly : .readWrite,
            policy: options.policy,
            locking: options.forcesShare ? .forceShare : .required,
            // Each image has its own caches; a mount of many shares the room.
            cacheByteCount: max(options.cacheByteCount / max(imageCount, 1), 1 << 20),
            decompressedCacheByteCount: max((32 << 20) / max(imageCount, 1), 4 << 20),
            bypassesPageCache: options.bypassesPageCache,
            passphrases: options.passphrases,
            logger: options.logger)
    }

    /// Opens the image; starts no thread.
    func open() throws(MountError) -> MountedImage {
        if !openOptions.mayWrite { return try openItself() }
        if let overlay { return try openBehind(overlay) }
        return try openItself()
    }

    private func openItself() throws(MountError) -> MountedImage {
        let image = try ClosingDaemon.waiting(for: path) { () throws(ImageError) in
            try Image.open(path, options: openOptions)
        }
        return MountedImage(image, path: path, rules: rules, logger: openOptions.logger)
    }

    /// Opens the image for a client while the mount is being served: threads may start.
    func openWhileServing() throws(SystemError) -> ImageAddress {
        do throws(ImageError) {
            let image = try Image.open(path, options: openOptions)
            let address = ImageAddress(
                MountedImage(image, path: path, rules: rules, logger: openOptions.logger))
            startThreads(of: image)
            return address
        } catch {
            openOptions.logger.error("\(error)")
            throw SystemError(code: error.code)
        }
    }

    /// Starts what an image does beside the requests; never before the daemon has forked.
    func startThreads(of image: Image) {
        if !image.isReadOnly { image.startCommitting(every: commitInterval) }
        image.startCountingAllocation()
    }

    /// The size and the times of an image that nobody has opened, without locking anybody out.
    func peek() throws(SystemError) -> ImageAttributes {
        var options = openOptions
        options.access = .readOnly
        options.locking = .forceShare
        options.passphrases = .locked
        do throws(ImageError) {
            let image = try Image.open(path, options: options)
            let mounted = MountedImage(image, path: path, logger: options.logger)
            let attributes = mounted.attributes()
            try image.close()
            return attributes
        } catch {
            throw SystemError(code: error.code)
        }
    }
}

extension OpenOptions {
    var mayWrite: Bool { access == .readWrite }
}
