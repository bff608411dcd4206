internal import Glibc
internal import QCOW2

extension Catalogue {
    /// Opens the images of `request` and gives each its name; starts no thread.
    static func make(_ request: MountRequest, at mountpoint: Mountpoint) throws(MountError)
        -> Catalogue
    {
        let options = request.options
        var sources: [String] = []
        for image in request.images { sources.append(try source(image, options)) }
        guard let first = sources.first else { throw MountError("", "no image is given") }
        if isDirectory(first) {
            return try mirror(first, sources, options, mountpoint)
        }
        if mountpoint.isFile, sources.count > 1 {
            throw MountError(
                mountpoint.path, "a file shows one image only: mount several on a directory")
        }
        if mountpoint.isFile, options.showsSnapshots {
            throw MountError(
                mountpoint.path, "a file shows no snapshots: mount on a directory for --snapshots")
        }
        if case .file = options.overlay, sources.count > 1 {
            throw MountError(
                "--overlay",
                "goes over one image, and \(sources.count) are given: --overlay tmp gives each"
                    + " one of its own")
        }
        let names = try names(of: sources, options)
        var nodes: [NodeAddress] = []
        for (source, name) in zip(sources, names) {
            let opener = ImageOpener(path: source, options: options, imageCount: sources.count)
            nodes.append(
                NodeAddress(FileNode(name: name, opener: opener, image: try opener.open())))
        }
        return Catalogue(
            mountpoint.isFile ? .file : .directory, source: joined(sources),
            showsSnapshots: options.showsSnapshots, nodes: nodes)
    }

    /// The absolute path of an image that may be opened as it is wanted.  A link stays one: files
    /// that the image names are looked for beside it, as QEMU does.
    private static func source(_ image: String, _ options: MountOptions) throws(MountError)
        -> String
    {
        var status = stat()
        guard stat(image, &status) == 0 else {
            let hint = image == "-" ? "an image is a file: a stream cannot be mounted" : nil
            throw MountError(image, hint ?? SystemError.last.description)
        }
        let kind = status.st_mode & S_IFMT
        guard kind == S_IFREG || kind == S_IFDIR else {
            throw MountError(image, "an image is a regular file, or a directory of them")
        }
        let writes = !options.isReadOnly && !options.forcesShare && options.overlay == nil
        if kind == S_IFREG, writes, access(image, W_OK) != 0 {
            let refusal = SystemError.last
            if access(image, R_OK) == 0 {
                throw MountError(
                    image, "may only be read (\(refusal)): give --read-only to mount it so")
            }
        }
        do throws(SystemError) {
            return try Paths.resolvedExceptLast(image)
        } catch {
            throw MountError(image, error)
        }
    }

    /// The name of each image's raw file.
    private static func names(of sources: [String], _ options: MountOptions) throws(MountError)
        -> [String]
    {
        if let name = options.name {
            guard sources.count == 1 else {
                throw MountError("--name", "names one image, and \(sources.count) are given")
            }
            guard let full = ExposedName.chosen(name) else {
                throw MountError("--name", "\(name) cannot be the name of a file")
            }
            return [full]
        }
        var owners: [String: String] = [:]
        for source in sources {
            let name = ExposedName.ofImage(at: source)
            guard ExposedName.isPossible(name) else {
                throw MountError(source, "the name is too long with .raw: give another with --name")
            }
            if let other = owners.updateValue(source, forKey: name) {
                throw MountError(source, "would be called \(name), as \(other) is already")
            }
        }
        return sources.map { ExposedName.ofImage(at: $0) }
    }

    private static func mirror(
        _ path: String, _ sources: [String], _ options: MountOptions, _ mountpoint: Mountpoint
    ) throws(MountError) -> Catalogue {
        guard sources.count == 1 else {
            throw MountError(path, "is a directory, which is mounted alone")
        }
        guard !mountpoint.isFile else {
            throw MountError(
                mountpoint.path, "a directory of images needs a directory to be mounted on")
        }
        guard options.name == nil, options.overlay == nil else {
            throw MountError(
                path, "--name and --overlay are for a single image, not for a directory")
        }
        let directory = ImageDirectory(path: path, options: options)
        try directory.checkNames()
        return Catalogue(
            .mirror(of: directory), source: path, showsSnapshots: options.showsSnapshots)
    }

    private static func isDirectory(_ path: String) -> Bool {
        var status = stat()
        return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR
    }

    /// The paths as one word of the mount table, which has little room.
    private static func joined(_ sources: [String]) -> String {
        let all = sources.joined(separator: ":")
        guard all.utf8.count > 2000, let first = sources.first else { return all }
        return first
    }
}
