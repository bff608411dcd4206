internal import Glibc

/// A new file that takes a path's place only when it is complete.
///
/// Until `commit()` it has no name, so that nothing stays behind of a program that is killed; or,
/// where a file system knows no such files, one beside the path, which goes when the value does.  A
/// file that is there already is locked as for writing meanwhile, so nobody loses one in use.  A
/// block device cannot be replaced, nor the raw file of a mounted image: they are written
/// themselves.
struct FileReplacement: ~Copyable {
    /// What to write to.
    let device: FileDevice
    private let path: String
    private var state: State
    private let replaced: FileDevice?

    private enum State {
        /// A new file without a name.
        case nameless
        /// A new file beside the path.
        case named(String)
        /// What was made has its name: a disk, or a new file in its place.
        case inPlace
    }

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
        if existing.isDisk {
            self.init(writing: existing)
        } else {
            try self.init(newFileAt: String(cString: resolved), replacing: existing)
        }
    }

    private init(writing device: FileDevice) {
        self.device = device
        path = device.name
        state = .inPlace
        replaced = nil
    }

    private init(newFileAt path: String, replacing existing: FileDevice?) throws(ImageError) {
        let (descriptor, state) = try Self.openNewFile(beside: path)
        if let existing { Self.copyOwnership(from: existing, to: descriptor) }
        do throws(ImageError) {
            device = try FileDevice(
                descriptor, name: path, access: .readWrite, bypassesPageCache: false,
                mapsBytes: false)
        } catch {
            if case .named(let temporary) = state { unlink(temporary) }
            throw error
        }
        self.path = path
        self.state = state
        replaced = existing
    }

    deinit {
        if case .named(let temporary) = state { unlink(temporary) }
    }

    private static func openNewFile(
        beside path: String
    ) throws(ImageError) -> (descriptor: Int32, state: State) {
        // A nameless file gets its name through /proc.
        if access("/proc/self/fd", X_OK) == 0 {
            let descriptor = open(directory(of: path) + "/", Platform.namelessFile, 0o644)
            if descriptor >= 0 { return (descriptor, .nameless) }
        }
        let temporary = temporaryPath(beside: path)
        let descriptor = open(temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o644)
        guard descriptor >= 0 else {
            throw ImageError(.system(.last, operation: "cannot create"), file: path)
        }
        return (descriptor, .named(temporary))
    }

    /// Whether two paths name one file, or would if something were there.
    static func areSame(_ first: String, _ second: String) -> Bool {
        if let identity = FileDevice.Identity(ofFileAt: first) {
            return identity == FileDevice.Identity(ofFileAt: second)
        }
        return name(of: first) == name(of: second)
            && FileDevice.Identity(ofFileAt: directory(of: first) + "/")
                == FileDevice.Identity(ofFileAt: directory(of: second) + "/")
    }

    /// Puts the new file in place, durably.
    consuming func commit() throws(ImageError) {
        do throws(SystemError) {
            _ = try retryingInterrupts { fsync(device.descriptor) }
            switch state {
            case .inPlace: return
            // A name that is taken by now is a file that nobody has looked at.
            case .nameless where replaced == nil: try link(to: path)
            case .nameless:
                let temporary = Self.temporaryPath(beside: path)
                try link(to: temporary)
                state = .named(temporary)
                try rename(temporary)
            case .named(let temporary): try rename(temporary)
            }
            state = .inPlace
            try Self.syncDirectory(of: path)
        } catch {
            throw ImageError(.system(error, operation: "cannot create"), file: path)
        }
    }

    private func link(to name: String) throws(SystemError) {
        let source = "/proc/self/fd/\(device.descriptor)"
        guard linkat(AT_FDCWD, source, AT_FDCWD, name, AT_SYMLINK_FOLLOW) == 0 else { throw .last }
    }

    private func rename(_ temporary: String) throws(SystemError) {
        guard Glibc.rename(temporary, path) == 0 else { throw .last }
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

    private static func name(of path: String) -> Substring {
        path.lastIndex(of: "/").map { path[path.index(after: $0)...] } ?? path[...]
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
