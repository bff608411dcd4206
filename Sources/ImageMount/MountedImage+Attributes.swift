internal import Glibc
internal import QCOW2
internal import Synchronization

/// What `stat` tells of the exposed file, as far as the image decides it.
package struct ImageAttributes: Sendable {
    /// Bytes.
    package var size: UInt64
    /// Guest data allocated in the chain, in units of 512 bytes.
    package var blockCount: UInt64
    /// Bytes a program should read or write at once.
    package var preferredByteCount: UInt64
    var times: ImageFiles.Times?
}

/// What `statfs` tells of the exposed file.
package struct SpaceReport: Sendable, Equatable {
    /// The cluster size: a loop device takes it for its discard granularity.
    package var unitByteCount: UInt64
    package var unitCount: UInt64
    package var freeUnitCount: UInt64
}

extension MountedImage {
    package borrowing func attributes() -> ImageAttributes {
        let size = image.size
        let cluster = image.clusterByteCount
        return ImageAttributes(
            size: size,
            blockCount: min(image.allocatedByteCount, size) / 512,
            preferredByteCount: min(max(cluster, 64 << 10), 1 << 20),
            times: files.times)
    }

    package borrowing func space() -> SpaceReport {
        let size = image.size
        let cluster = max(image.clusterByteCount, 512)
        let total = (size / cluster) + (size % cluster == 0 ? 0 : 1)
        let used = min(image.allocatedByteCount / cluster, total)
        return SpaceReport(unitByteCount: cluster, unitCount: total, freeUnitCount: total &- used)
    }
}
