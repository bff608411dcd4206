internal import Glibc

/// The file under an image, held by a descriptor that can only be asked for attributes.
///
/// It follows the file through renames, and takes part in no lock.
final class ImageFile: Sendable {
    private let descriptor: Int32

    init?(_ path: String) {
        descriptor = open(path, O_PATH | O_CLOEXEC)
        guard descriptor >= 0 else { return nil }
    }

    deinit { close(descriptor) }

    /// When the file was last read, written and changed.
    var times: Times? {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { return nil }
        return Times(access: status.st_atim, modification: status.st_mtim, change: status.st_ctim)
    }

    struct Times: Sendable {
        let access: timespec
        let modification: timespec
        let change: timespec
    }
}
