internal import Glibc
internal import QCOW2

extension ImageOpener {
    /// Opens a new overlay, with the image below it, read-only.
    func openBehind(_ overlay: MountOptions.Overlay) throws(MountError) -> MountedImage {
        switch overlay {
        case .file(let overlayPath):
            guard access(overlayPath, F_OK) != 0 else {
                throw MountError(overlayPath, "exists already: an overlay is a new file")
            }
            return try openOverlay(overlayPath, isTemporary: false)
        case .temporary:
            let directory = try Self.temporaryDirectory()
            let overlayPath = directory + "/overlay.qcow2"
            // The open file needs no name: it is gone with the last descriptor, whatever happens.
            defer {
                unlink(overlayPath)
                rmdir(directory)
            }
            return try openOverlay(overlayPath, isTemporary: true)
        }
    }

    private func openOverlay(
        _ overlayPath: String, isTemporary: Bool
    ) throws(MountError) -> MountedImage {
        var creation = CreateOptions()
        creation.backingFile = path
        creation.backingFormat = "qcow2"
        var options = openOptions
        // Beside the image, and beside what it may be a link to.
        options.policy.allowedDirectories.append(Paths.directory(of: path))
        if let real = try? Paths.resolved(path) {
            options.policy.allowedDirectories.append(Paths.directory(of: real))
        }
        do throws(ImageError) {
            if try isEncrypted() {
                creation.encryption = try encryption(&options.passphrases, isTemporary: isTemporary)
            }
            try Image.create(at: overlayPath, size: nil, options: creation)
        } catch {
            throw MountError(error)
        }
        do throws(ImageError) {
            let image = try Image.open(overlayPath, options: options)
            return MountedImage(
                image, path: path, writtenFile: overlayPath, rules: rules, logger: options.logger)
        } catch {
            unlink(overlayPath)
            throw MountError(error)
        }
    }

    /// Whether the disk's data is encrypted anywhere in its chain: what is copied up from there
    /// must not lie in the overlay in clear text.
    private func isEncrypted() throws(ImageError) -> Bool {
        var options = openOptions
        options.access = .readOnly
        options.passphrases = .locked
        let image = try Image.open(path, options: options)
        let isEncrypted = image.isEncrypted
        try image.close()
        return isEncrypted
    }

    /// What encrypts the overlay: the image's passphrase, and where nobody opens it again one that
    /// nobody knows, for which deriving a key need not take long.
    private func encryption(
        _ source: inout PassphraseSource, isTemporary: Bool
    ) throws(ImageError) -> LUKSOptions? {
        source = try source.answered(for: path)
        guard isTemporary else { return source.passphrases.first.map(LUKSOptions.init) }
        let passphrase = try Passphrase.random()
        source.passphrases.insert(passphrase, at: 0)
        var options = LUKSOptions(passphrase: passphrase)
        options.milliseconds = 1
        return options
    }

    private static func temporaryDirectory() throws(MountError) -> String {
        let parent = getenv("TMPDIR").map { String(cString: $0) } ?? "/var/tmp"
        var template = Array((parent + "/qcowfs-XXXXXX").utf8CString)
        guard mkdtemp(&template) != nil else { throw MountError(parent, .last) }
        return String(decoding: template.dropLast().map(UInt8.init(bitPattern:)), as: UTF8.self)
    }
}
