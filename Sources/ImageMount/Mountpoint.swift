internal import Glibc
internal import QCOW2

/// An existing directory or regular file to mount on.
struct Mountpoint: Sendable {
    /// Absolute, links resolved.
    let path: String
    let isFile: Bool

    /// Takes away the dead mount of a killed daemon first, where there is one.
    init(_ path: String) throws(MountError) {
        if Mounts.isDead(path) { try Self.clear(path) }
        var status = stat()
        guard stat(path, &status) == 0 else { throw MountError(path, .last) }
        switch status.st_mode & S_IFMT {
        case S_IFDIR: isFile = false
        case S_IFREG: isFile = true
        default: throw MountError(path, "a mountpoint is a directory or a regular file")
        }
        do throws(SystemError) {
            self.path = try Paths.resolved(path)
        } catch {
            throw MountError(path, error)
        }
    }

    private static func clear(_ path: String) throws(MountError) {
        do throws(SystemError) {
            let absolute = try Paths.resolvedExceptLast(path)
            guard MountTable.entry(at: absolute)?.isOurs == true else { return }
            try Unmounter.unmount(absolute, lazily: true)
        } catch {
            throw MountError(path, "the mount of a killed daemon cannot be taken away: \(error)")
        }
    }
}
