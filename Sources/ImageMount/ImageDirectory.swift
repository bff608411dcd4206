internal import Glibc
internal import Logging
internal import QCOW2
internal import Synchronization

/// A directory whose qcow2 files a mount shows, as they come and go.
struct ImageDirectory: Sendable {
    /// An absolute path.
    let path: String
    let options: MountOptions
    /// Names that were told to be shadowed or too long.
    private let log: TroubleLog

    /// At most this many files are shown; what is opened is bounded by the clients.
    private static let limit = 65536

    init(path: String, options: MountOptions) {
        self.path = path
        self.options = options
        log = TroubleLog(options.logger)
    }

    struct Found: Sendable {
        let name: String
        let path: String
        let identity: FileIdentity
    }

    func opener(for path: String) -> ImageOpener {
        // How many will be open at once is not known; a few, mostly.
        ImageOpener(path: path, options: options, imageCount: 4)
    }

    /// Refuses a directory in which two images would have one name.
    func checkNames() throws(MountError) {
        guard access(path, R_OK | X_OK) == 0 else { throw MountError(path, .last) }
        var owners: [String: String] = [:]
        for image in TextFile.names(in: path).sorted().compactMap({ image(in: $0) }) {
            if let other = owners.updateValue(image.path, forKey: image.name) {
                throw MountError(
                    image.path, "would be called \(image.name), as \(other) is already")
            }
        }
    }

    /// The qcow2 files there are, each exposed name once.
    func images() -> [Found] {
        var found: [String: Found] = [:]
        for file in TextFile.names(in: path).sorted() {
            guard found.count < Self.limit, let image = image(in: file) else { continue }
            if let first = found[image.name] {
                log.once("\(image.path): not shown, for \(first.path) has the name \(image.name)")
            } else {
                found[image.name] = image
            }
        }
        return Array(found.values)
    }

    /// The image shown under `name`; what `images()` shows, without looking into every file.
    func image(exposedAs name: String) -> Found? {
        guard name.hasSuffix(".raw") else { return nil }
        let stem = String(name.dropLast(4))
        for file in [stem, stem + ".img", stem + ".qcow", stem + ".qcow2"] {
            if ExposedName.ofImage(at: file) == name, let found = image(in: file) { return found }
        }
        return nil
    }

    private func image(in file: String) -> Found? {
        guard !file.hasPrefix(".") else { return nil }
        let full = path + "/" + file
        var status = stat()
        guard stat(full, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { return nil }
        guard Self.hasMagic(full) else { return nil }
        let name = ExposedName.ofImage(at: file)
        guard ExposedName.isPossible(name) else {
            log.once("\(full): not shown, for its name with .raw is longer than a file name may be")
            return nil
        }
        return Found(name: name, path: full, identity: FileIdentity(status))
    }

    /// Whether the file begins as a qcow2 image does.
    static func hasMagic(_ path: String) -> Bool {
        // Not blocking, for the file may have become a pipe since it was looked at.
        let descriptor = Glibc.open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard descriptor >= 0 else { return false }
        defer { close(descriptor) }
        return withUnsafeTemporaryAllocation(byteCount: 4, alignment: 4) { bytes in
            pread(descriptor, bytes.baseAddress, 4, 0) == 4
                && bytes.elementsEqual([0x51, 0x46, 0x49, 0xfb])
        }
    }
}
