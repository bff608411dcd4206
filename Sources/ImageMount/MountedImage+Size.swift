internal import Glibc
package import QCOW2

extension MountedImage {
    /// Takes a client's wish for another size, and returns the size the file then has.
    ///
    /// The size is the image's.  Truncating to 0, as an open with O_TRUNC does, changes nothing, so
    /// that `dd of=` and `cp` onto the disk work as on a block device.
    package borrowing func truncate(to newSize: UInt64) throws(SystemError) -> UInt64 {
        let size = image.size
        guard newSize != 0, newSize != size else { return size }
        guard !image.isReadOnly else { throw .readOnly }
        guard newSize > size || rules.allowsShrinking else { throw SystemError(code: EPERM) }
        guard newSize.isMultiple(of: 512) else { throw .invalid }
        try attempt { () throws(ImageError) in
            try image.resize(to: newSize, shrinking: rules.allowsShrinking)
        }
        return image.size
    }
}
