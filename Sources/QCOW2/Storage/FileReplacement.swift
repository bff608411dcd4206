internal import Glibc

/// A new file that takes a path's place only when it is complete.
///
/// Until `commit()` it has a name of its own beside the path, which goes when the value does.  A
/// file that is there already is locked as for writing meanwhile, so nobody loses one in use.  A
/// block device cannot be replaced: it is written itself.
struct FileReplacement: ~Copyable {
    /// What to write to.
    let device: FileDevice
    private let path: String
    /// Nil for a block device, and when the new file has taken its place.
    private var temporaryPath: String?
    private let replaced: FileDevice?

    /// - Throws: `.locked` where the file at `path` is in use, `.system` where none can be made.
    init(of path: String) throws(ImageError) {
        var status = stat()
        guard lstat(path, &status) == 0 else {
            guard errno == ENOENT else {
                throw ImageError(.system(.last, operation: "cannot create"), file: path)
            }
            try self.init(newFileAt: path, replacing: nil)
            return
        }
        // The file behind a link is replaced, not the link.
        guard let resolved = realpath(path, nil) else {
            throw ImageError(.system(.last, operation: "cannot create"), file: path)
        }
        defer { free(resolved) }
        let existing = try FileDevice(path: path, access: .readWrite, mapsBytes: false)
        try ImageLock.take(.writer, on: existing)
        if existing.isBlockDevice {
            self.init(writing: existing)
        } else {
            try self.init(newFileAt: String(cString: resolved), replacing: existing)
        }
    }

    private init(writing device: FileDevice) {
        self.device = device
        path = device.name
        temporaryPath = nil
        replaced = nil
    }

    private init(newFileAt path: String, replacing existing: FileDevice?) throws(ImageError) {
        let temporary = Self.temporaryPath(beside: path)
        let descriptor = open(temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o644)
        guard descriptor >= 0 else {
            throw ImageError(.system(.last, operation: "cannot create"), file: path)
        }
        if let existing { Self.copyOwnership(from: existing, to: descriptor) }
        do throws(ImageError) {
            device = try FileDevice(
                descriptor, name: path, access: .readWrite, bypassesPageCache: false,
                mapsBytes: false)
        } catch {
            unlink(temporary)
            throw error
        }
        self.path = path
        temporaryPath = temporary
        replaced = existing
    }

    deinit {
        if let temporaryPath { unlink(temporaryPath) }
    }

    /// Puts the new file in place, durably.
    consuming func commit() throws(ImageError) {
        do throws(SystemError) {
            _ = try retryingInterrupts { fsync(device.descriptor) }
            guard let temporaryPath else { return }
            guard rename(temporaryPath, path) == 0 else { throw .last }
            self.temporaryPath = nil
            try Self.syncDirectory(of: path)
        } catch {
            throw ImageError(.system(error, operation: "cannot create"), file: path)
        }
    }

    /// The new file belongs to whom the old one did, as far as the system lets us say so.
    private static func copyOwnership(from existing: FileDevice, to descriptor: Int32) {
        var status = stat()
        guard fstat(existing.descriptor, &status) == 0 else { return }
        _ = fchown(descriptor, status.st_uid, status.st_gid)
        _ = fchmod(descriptor, status.st_mode & 0o777)
    }

    /// A short name, because that of the image may be as long as names can be.
    private static func temporaryPath(beside path: String) -> String {
        let suffix = String(UInt64.random(in: 0 ... .max), radix: 36)
        return directory(of: path) + "/.qcowfs-\(suffix).tmp"
    }

    private static func directory(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "" : String(path[..<slash])
    }

    private static func syncDirectory(of path: String) throws(SystemError) {
        let descriptor = try retryingInterrupts {
            open(directory(of: path) + "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        }
        defer { close(descriptor) }
        do throws(SystemError) {
            _ = try retryingInterrupts { fsync(descriptor) }
        } catch {
            // Some file systems sync no directories: nothing more can be done there.
            if error.code != EINVAL { throw error }
        }
    }
}
