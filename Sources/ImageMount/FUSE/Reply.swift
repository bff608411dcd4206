internal import CFuse3
internal import Glibc

/// The one answer owed to a FUSE request.
///
/// Not copyable, and every way of answering consumes it: a second answer does not compile.
/// A request left unanswered hangs its caller for ever, so a dropped reply answers EIO.
struct Reply: ~Copyable {
    private let request: fuse_req_t

    init(_ request: fuse_req_t) { self.request = request }

    deinit { fuse_reply_err(request, EIO) }

    /// Lets another thread answer: it makes a new `Reply` from what this returns.
    consuming func later() -> fuse_req_t {
        let request = request
        discard self
        return request
    }

    /// Answers an `errno`, or success where nothing else is to be said.
    consuming func status(_ code: Int32) {
        fuse_reply_err(request, code)
        discard self
    }

    consuming func attributes(_ attributes: stat, validFor seconds: Double) {
        withUnsafePointer(to: attributes) { _ = fuse_reply_attr(request, $0, seconds) }
        discard self
    }

    consuming func entry(_ entry: fuse_entry_param) {
        withUnsafePointer(to: entry) { _ = fuse_reply_entry(request, $0) }
        discard self
    }

    /// Answers an open; false where the client has gone, and no release will follow.
    consuming func opened(_ handle: UInt64, flags: UInt32) -> Bool {
        let status = qcowfs_reply_open(request, handle, flags)
        discard self
        return status != -ENOENT
    }

    consuming func written(_ byteCount: Int) {
        fuse_reply_write(request, byteCount)
        discard self
    }

    consuming func offset(_ offset: UInt64) {
        fuse_reply_lseek(request, off_t(clamping: offset))
        discard self
    }

    consuming func space(_ report: statvfs) {
        withUnsafePointer(to: report) { _ = fuse_reply_statfs(request, $0) }
        discard self
    }

    /// Answers bytes, and returns 0 or a negative `errno`: the request is answered in any case.
    @discardableResult
    consuming func data(_ bytes: UnsafeRawBufferPointer) -> Int32 {
        let start = bytes.baseAddress?.assumingMemoryBound(to: CChar.self)
        let status = fuse_reply_buf(request, start, bytes.count)
        discard self
        return status
    }

    /// Answers the bytes of all `pieces` in one gathering write; as `data`.
    @discardableResult
    consuming func data(_ pieces: UnsafeMutableBufferPointer<iovec>) -> Int32 {
        // One piece needs no copy of the list, which libfuse makes for several.
        let status =
            if pieces.count == 1, let piece = pieces.first {
                fuse_reply_buf(
                    request, piece.iov_base?.assumingMemoryBound(to: CChar.self), piece.iov_len)
            } else {
                fuse_reply_iov(request, pieces.baseAddress, Int32(clamping: pieces.count))
            }
        discard self
        return status
    }
}
