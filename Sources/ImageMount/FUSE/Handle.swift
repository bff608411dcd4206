internal import CFuse3
internal import Glibc

/// What the kernel hands back with every request on an open file: where the image lies, and whose
/// handle it is, in one word.
struct Handle {
    let word: UInt64

    /// The handle was opened by this process, which only flushes the file's dirty pages.
    private static let ownFlag: UInt64 = 1
    /// The handle goes past the page cache.
    private static let directFlag: UInt64 = 2

    init(_ opening: FileNode.Opening, isOwn: Bool) {
        // Memory that was allocated is aligned to more than the flags' bits.
        word =
            UInt64(UInt(bitPattern: opening.image.pointer)) | (isOwn ? Self.ownFlag : 0)
            | (opening.mode == .direct ? Self.directFlag : 0)
    }

    @inline(__always)
    init?(_ info: UnsafeMutablePointer<fuse_file_info>?) {
        guard let info else { return nil }
        word = info.pointee.fh
    }

    var isOwn: Bool { word & Self.ownFlag != 0 }
    var isDirect: Bool { word & Self.directFlag != 0 }
    var mode: OpenCounts.Mode { isDirect ? .direct : .cached }

    @inline(__always)
    var image: UnsafeMutablePointer<MountedImage>? {
        UnsafeMutablePointer(bitPattern: UInt(word & ~(Self.ownFlag | Self.directFlag)))
    }
}
