internal import CFuse3
internal import Glibc
internal import QCOW2

func answerOpen(
    _ number: fuse_ino_t, flags: Int32, by caller: pid_t, _ context: borrowing MountContext,
    _ reply: consuming Reply
) {
    guard let node = context.node(number) else { return reply.status(EISDIR) }
    let isWriter = flags & O_ACCMODE != O_RDONLY
    guard !isWriter || !(context.isReadOnly || node.pointee.source.isReadOnly) else {
        return reply.status(EROFS)
    }
    let isOwn = context.ownAccess.isOwn(thread: caller)
    do throws(SystemError) {
        // What a kernel holds back while it writes back must be seen by direct requests too: with
        // cached handles it looks after that itself.
        let prefersDirect =
            isWriter && flags & O_DIRECT != 0 && !context.writesBack
            && context.kernel.keepsDirectWritersCoherent
        let opening =
            isOwn
            ? try node.pointee.openForFlushing()
            : try node.pointee.open(isWriter: isWriter, prefersDirect: prefersDirect)
        let handle = Handle(opening, isOwn: isOwn)
        if !reply.opened(handle.word, flags: isOwn ? flagsForFlushing : opening.flags) {
            close(node, handle, isWriter: isWriter)
        }
    } catch {
        reply.status(error.code)
    }
}

func answerRelease(
    _ number: fuse_ino_t, _ info: UnsafeMutablePointer<fuse_file_info>?,
    _ context: borrowing MountContext, _ reply: consuming Reply
) {
    guard let node = context.node(number), let info, let handle = Handle(info) else {
        return reply.status(EBADF)
    }
    close(node, handle, isWriter: info.pointee.flags & O_ACCMODE != O_RDONLY)
    reply.status(0)
}

private func close(_ node: UnsafeMutablePointer<FileNode>, _ handle: Handle, isWriter: Bool) {
    if handle.isOwn {
        node.pointee.closeAfterFlushing()
    } else {
        node.pointee.close(isWriter: isWriter, mode: handle.mode)
    }
}

/// How our own descriptors are opened.  Past the cache, although they flush it: the kernel lets an
/// open that uses the cache wait for every direct write, and one of those may wait for us.
private let flagsForFlushing = UInt32(FOPEN_DIRECT_IO) | UInt32(FOPEN_KEEP_CACHE)

extension FileNode.Opening {
    /// The kernel's words for how the handle uses the cache.
    fileprivate var flags: UInt32 {
        switch mode {
        case .direct: UInt32(FOPEN_DIRECT_IO) | UInt32(FOPEN_PARALLEL_DIRECT_WRITES)
        case .cached: keepsCache ? UInt32(FOPEN_KEEP_CACHE) : 0
        }
    }
}
