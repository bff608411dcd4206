internal import CFuse3
internal import Glibc
internal import Synchronization

extension fuse_lowlevel_ops {
    /// The requests that are answered, one line each; libfuse answers the others with ENOSYS.
    ///
    /// The closures capture nothing, so that C may call them, and stand in no actor, so that any
    /// worker thread may.  Extended attributes are left out on purpose: asked once and refused, the
    /// kernel never asks again, and each write is spared a question.
    static var answered: fuse_lowlevel_ops {
        var operations = fuse_lowlevel_ops()
        operations.`init` = { context, connection in
            guard let context, let connection else { return }
            let address = context.assumingMemoryBound(to: MountContext.self)
            address.pointee.kernel.learn(minor: connection.pointee.proto_minor)
            agree(on: connection, writesBack: address.pointee.writesBack)
        }
        operations.lookup = { request, _, name in
            guard let name else { return refuse(request) }
            serve(request) { answerLookUp(name, $0, $1) }
        }
        operations.getattr = { request, number, _ in
            guard let caller = fuse_req_ctx(request)?.pointee.pid else { return refuse(request) }
            serve(request) { answerGetAttributes(number, by: caller, $0, $1) }
        }
        operations.setattr = { request, number, wanted, mask, info in
            guard let wanted else { return refuse(request) }
            serve(request) { answerSetAttributes(number, wanted.pointee, mask, info, $0, $1) }
        }
        operations.statfs = { request, number in
            serve(request) { answerSpace(number, $0, $1) }
        }
        operations.opendir = { request, _, info in
            guard let info else { return refuse(request) }
            serve(request) { answerOpenDirectory(info, $0, $1) }
        }
        operations.readdir = { request, _, count, offset, info in
            serveDirectory(request, count: count, from: offset, info)
        }
        operations.releasedir = { request, _, info in
            if let info { closeListing(info) }
            fuse_reply_err(request, 0)
        }
        operations.open = { request, number, info in
            guard let info, let caller = fuse_req_ctx(request)?.pointee.pid else {
                return refuse(request)
            }
            serve(request) { answerOpen(number, flags: info.pointee.flags, by: caller, $0, $1) }
        }
        operations.release = { request, number, info in
            serve(request) { answerRelease(number, info, $0, $1) }
        }
        operations.read = { request, number, count, offset, info in
            guard let handle = Handle(info) else { return refuse(request) }
            serve(request) {
                answerRead(count, at: UInt64(clamping: offset), number, handle, $0, $1)
            }
        }
        operations.write = { request, number, data, count, offset, info in
            guard let handle = Handle(info) else { return refuse(request) }
            let bytes = UnsafeRawBufferPointer(start: data, count: count)
            let path = WritePath(info)
            serve(request) {
                answerWrite(bytes, at: UInt64(clamping: offset), path, number, handle, $0, $1)
            }
        }
        operations.fsync = { request, _, _, info in
            guard let handle = Handle(info) else { return refuse(request) }
            serve(request) { answerFlush(handle, $0, $1) }
        }
        operations.fallocate = { request, number, mode, offset, count, info in
            guard let handle = Handle(info) else { return refuse(request) }
            serve(request) {
                answerAllocate(
                    mode, at: UInt64(clamping: offset), count: UInt64(clamping: count), number,
                    handle, $0, $1)
            }
        }
        operations.lseek = { request, number, offset, whence, info in
            guard let handle = Handle(info) else { return refuse(request) }
            serve(request) {
                // What is below 0 is past every end.
                answerSeek(
                    whence, from: UInt64(truncatingIfNeeded: offset), number, handle, $0, $1)
            }
        }
        return operations
    }
}

/// Hands `body` the mount behind `request`, and the one reply it must give.
@inline(__always)
func serve(
    _ request: fuse_req_t?, _ body: (borrowing MountContext, consuming Reply) -> Void
) {
    guard let request, let context = fuse_req_userdata(request) else { return }
    let mount = context.assumingMemoryBound(to: MountContext.self)
    if mount.pointee.counters.pointer.pointee.isEnding.load(ordering: .relaxed) {
        Reply(request).status(EIO)
    } else {
        body(mount.pointee, Reply(request))
    }
}

/// Answers a request that comes without what it is about.
private func refuse(_ request: fuse_req_t?) {
    if let request { Reply(request).status(EINVAL) }
}

/// Agrees with the kernel on how the session works.
private func agree(on connection: UnsafeMutablePointer<fuse_conn_info>, writesBack: Bool) {
    // A copy of our own beats a pipe, and libfuse's pipes fail at 1 MiB without privileges.
    for capability in [FUSE_CAP_SPLICE_READ, FUSE_CAP_SPLICE_WRITE, FUSE_CAP_SPLICE_MOVE] {
        qcowfs_wish(connection, UInt64(capability), false)
    }
    qcowfs_wish(connection, UInt64(FUSE_CAP_ASYNC_READ), true)
    qcowfs_wish(connection, UInt64(FUSE_CAP_ASYNC_DIO), true)
    // Times move with every write; the pages that the kernel has stay right all the same.
    qcowfs_wish(connection, UInt64(FUSE_CAP_AUTO_INVAL_DATA), false)
    qcowfs_wish(connection, UInt64(FUSE_CAP_EXPLICIT_INVAL_DATA), true)
    // O_TRUNC must come as a change of size, which is answered with the size that stays.
    qcowfs_wish(connection, UInt64(FUSE_CAP_ATOMIC_O_TRUNC), false)
    qcowfs_wish(connection, UInt64(FUSE_CAP_WRITEBACK_CACHE), writesBack)
    connection.pointee.max_readahead = 1 << 20
    connection.pointee.max_background = 64
    connection.pointee.congestion_threshold = 48
}
