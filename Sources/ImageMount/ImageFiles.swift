internal import Glibc

/// The files that take an image's writes, held by descriptors that can only be asked for
/// attributes.
///
/// They follow the files through renames, and take part in no lock.
final class ImageFiles: Sendable {
    private let descriptors: [Int32]

    /// - Parameter paths: the image, and the file with its data, where that is another one.
    init(_ paths: [String]) {
        descriptors = paths.map { open($0, O_PATH | O_CLOEXEC) }.filter { $0 >= 0 }
    }

    deinit { for descriptor in descriptors { close(descriptor) } }

    /// When one of the files was last read, written and changed; nil where there is no file.
    var times: Times? {
        var newest: Times?
        for descriptor in descriptors {
            var status = stat()
            guard fstat(descriptor, &status) == 0 else { continue }
            newest = Times(status).orLater(newest)
        }
        return newest
    }

    struct Times: Sendable {
        let access: timespec
        let modification: timespec
        let change: timespec

        init(_ status: stat) {
            (access, modification, change) = (status.st_atim, status.st_mtim, status.st_ctim)
        }

        private init(access: timespec, modification: timespec, change: timespec) {
            (self.access, self.modification, self.change) = (access, modification, change)
        }

        func orLater(_ other: Times?) -> Times {
            guard let other else { return self }
            return Times(
                access: access.orLater(other.access),
                modification: modification.orLater(other.modification),
                change: change.orLater(other.change))
        }
    }
}

extension timespec {
    fileprivate func orLater(_ other: timespec) -> timespec {
        (tv_sec, tv_nsec) < (other.tv_sec, other.tv_nsec) ? other : self
    }
}
