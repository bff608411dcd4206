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
            return try openOverlay(overlayPath)
        case .temporary:
            let directory = try Self.temporaryDirectory()
            let overlayPath = directory + "/overlay.qcow2"
            // The open file needs no name: it is gone with the last descriptor, whatever happens.
            defer {
                unlink(overlayPath)
                rmdir(directory)
            }
            return try openOverlay(overlayPath)
        }
    }

    private func openOverlay(_ overlayPath: String) throws(MountError) -> MountedImage {
        var creation = CreateOptions()
        creation.backingFile = path
        creation.backingFormat = "qcow2"
        var options = openOptions
        options.policy.allowedDirectories.append(Paths.directory(of: path))
        do throws(ImageError) {
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

    private static func temporaryDirectory() throws(MountError) -> String {
        let parent = getenv("TMPDIR").map { String(cString: $0) } ?? "/var/tmp"
        var template = Array((parent + "/qcowfs-XXXXXX").utf8CString)
        guard mkdtemp(&template) != nil else { throw MountError(parent, .last) }
        return String(decoding: template.dropLast().map(UInt8.init(bitPattern:)), as: UTF8.self)
    }
}
