internal import CFuse3
internal import Glibc
internal import QCOW2

/// Answers a read; past the page cache, what other clients have dirty there is written first.
@inline(__always)
func answerRead(
    _ count: Int, at offset: UInt64, _ number: fuse_ino_t, _ handle: Handle,
    _ context: borrowing MountContext, _ reply: consuming Reply
) {
    if handle.isDirect, let node = context.node(number), node.pointee.writerCount > 0 {
        context.ownAccess.readAfterFlush(
            PendingRead(
                request: reply.later(), number: number, handle: handle, count: count,
                offset: offset))
    } else {
        read(count, at: offset, handle, context, reply)
    }
}

/// Answers a read with pieces of the image's files; short only at the end of the disk.
func read(
    _ count: Int, at offset: UInt64, _ handle: Handle, _ context: borrowing MountContext,
    _ reply: consuming Reply
) {
    guard let image = handle.image, let scratch = context.scratch.ofThisThread() else {
        return reply.status(ENOMEM)
    }
    let start = OperationCounter.now()
    let count = min(image.pointee.clipped(count, at: offset), Scratch.byteCount)
    guard count > 0 else {
        reply.data(UnsafeRawBufferPointer(start: nil, count: 0))
        return
    }
    var owed: Reply? = consume reply
    do throws(ImageError) {
        // The pieces stay as they are until the reply has been given: it is given inside.
        let status = try image.pointee.withPieces(at: offset, count: count, scratch) { pieces in
            owed.take()?.data(pieces) ?? 0
        }
        context.counters.pointer.pointee.reads.add(count, since: start)
        if status < 0 { reportLostReply(status, image, at: offset, context) }
    } catch {
        owed.take()?.status(image.pointee.told(error).code)
    }
}

/// Tells of a reply that the kernel did not take.  The client has got EIO by then, at once.
@inline(never)
private func reportLostReply(
    _ status: Int32, _ image: UnsafeMutablePointer<MountedImage>, at offset: UInt64,
    _ context: borrowing MountContext
) {
    // A client that was killed takes no reply: nothing to tell.
    guard status == -EFAULT else { return }
    context.log.once("\(image.pointee.path): a file of the image was cut short or cannot be read")
}

/// How bytes came from the client to us.
enum WritePath {
    /// The kernel passes on what the client has just written.
    case through
    /// The kernel has kept the bytes for a while, and believes the file to be as large as they
    /// reach: a short answer would tell nobody that they do not all fit.
    case fromCache
    /// With O_DIRECT, past the kernel's pages.
    case direct

    @inline(__always)
    init(_ info: UnsafeMutablePointer<fuse_file_info>?) {
        guard let info else {
            self = .through
            return
        }
        self =
            info.pointee.writepage == 1
            ? .fromCache : info.pointee.flags & O_DIRECT != 0 ? .direct : .through
    }
}

func answerWrite(
    _ bytes: UnsafeRawBufferPointer, at offset: UInt64, _ path: WritePath, _ number: fuse_ino_t,
    _ handle: Handle, _ context: borrowing MountContext, _ reply: consuming Reply
) {
    guard let image = handle.image else { return reply.status(EBADF) }
    let start = OperationCounter.now()
    do throws(SystemError) {
        let count = try image.pointee.write(bytes, at: offset)
        // Counted before the answer: whoever asks after it finds the write.
        context.counters.pointer.pointee.writes.add(count, since: start)
        guard count == bytes.count || path != .fromCache || !context.writesBack else {
            throw .noSpace
        }
        if path == .direct, hasCachedHandles(number, besides: handle, context) {
            context.ownAccess.answerAfterDroppingPages(
                PendingWrite(
                    request: reply.later(), number: number, offset: offset, count: count))
        } else {
            reply.written(count)
        }
    } catch {
        // The kernel that writes back has already believed the larger size.
        if context.writesBack, error == .noSpace { context.ownAccess.restoreSize(of: number) }
        reply.status(error.code)
    }
}

/// Whether somebody else may have pages of the file.
private func hasCachedHandles(
    _ number: fuse_ino_t, besides handle: Handle, _ context: borrowing MountContext
) -> Bool {
    guard let node = context.node(number) else { return false }
    return node.pointee.cachedHandleCount > (handle.isDirect ? 0 : 1)
}

func answerFlush(_ handle: Handle, _ context: borrowing MountContext, _ reply: consuming Reply) {
    guard let image = handle.image else { return reply.status(EBADF) }
    let start = OperationCounter.now()
    do throws(SystemError) {
        try image.pointee.flush()
        context.counters.pointer.pointee.flushes.add(0, since: start)
        reply.status(0)
    } catch {
        reply.status(error.code)
    }
}

func answerAllocate(
    _ mode: Int32, at offset: UInt64, count: UInt64, _ number: fuse_ino_t, _ handle: Handle,
    _ context: borrowing MountContext, _ reply: consuming Reply
) {
    guard let image = handle.image else { return reply.status(EBADF) }
    guard let wanted = AllocationRequest(mode: mode) else { return reply.status(EOPNOTSUPP) }
    let start = OperationCounter.now()
    do throws(SystemError) {
        try image.pointee.allocate(wanted, at: offset, count: count)
        context.counters.pointer.pointee.allocations.add(Int(clamping: count), since: start)
        let (end, overflows) = offset.addingReportingOverflow(count)
        if !wanted.keepsSize, overflows || end > image.pointee.size {
            // The kernel believes that the file has grown.  It is told before the answer, so that
            // it asks again whichever of the two it does first.
            context.ownAccess.kernelForgetsAttributes(of: number)
            if context.writesBack { context.ownAccess.restoreSize(of: number) }
        }
        reply.status(0)
    } catch {
        reply.status(error.code)
    }
}

/// Answers SEEK_DATA and SEEK_HOLE.
///
/// The kernel does not write dirty pages before it asks.  While a client may have some, a thread of
/// its own writes them first and answers then: it waits for writes that workers must take.
func answerSeek(
    _ whence: Int32, from offset: UInt64, _ number: fuse_ino_t, _ handle: Handle,
    _ context: borrowing MountContext, _ reply: consuming Reply
) {
    guard let image = handle.image, let node = context.node(number) else {
        return reply.status(EBADF)
    }
    guard let target = SeekTarget(whence: whence) else { return reply.status(EINVAL) }
    context.counters.pointer.pointee.seeks.add(0, since: OperationCounter.now())
    if node.pointee.writerCount > 0 {
        context.ownAccess.seekAfterFlush(
            PendingSeek(
                request: reply.later(), number: number, image: ImageAddress(pointer: image),
                target: target, offset: offset))
    } else {
        seek(target, from: offset, in: image, reply)
    }
}

/// Answers from the metadata alone.
func seek(
    _ target: SeekTarget, from offset: UInt64, in image: UnsafeMutablePointer<MountedImage>,
    _ reply: consuming Reply
) {
    do throws(SystemError) {
        reply.offset(try image.pointee.seek(target, from: offset))
    } catch {
        reply.status(error.code)
    }
}
