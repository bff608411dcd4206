internal import CFuse3
internal import Glibc
internal import QCOW2

func answerGetAttributes(
    _ number: fuse_ino_t, by caller: pid_t, _ context: borrowing MountContext,
    _ reply: consuming Reply
) {
    guard let node = context.node(number) else {
        return reply.attributes(context.appearance.directory, validFor: context.nameValidity)
    }
    // Who tells the kernel the size asks too, and would wait for itself.
    if context.writesBack, !context.ownAccess.isOwn(thread: caller) {
        context.ownAccess.waitForSize(of: number)
    }
    do throws(SystemError) {
        let status = try status(of: node, context)
        // While the kernel has the wrong size, it is to ask again each time.
        let isWrong = context.writesBack && context.ownAccess.isRestoring(number)
        reply.attributes(status, validFor: isWrong ? 0 : context.attributeValidity)
    } catch {
        reply.status(error.code)
    }
}

/// What `stat` tells of a file, its image open or not.
func status(
    of node: UnsafeMutablePointer<FileNode>, _ context: borrowing MountContext
) throws(SystemError) -> stat {
    let attributes = try node.pointee.attributes()
    return context.appearance.file(
        attributes, inodeNumber: node.pointee.inodeNumber)
}

/// Takes a change of size; times are the image's own, owner and mode are the mount's.
func answerSetAttributes(
    _ number: fuse_ino_t, _ wanted: stat, _ mask: Int32,
    _ info: UnsafeMutablePointer<fuse_file_info>?, _ context: borrowing MountContext,
    _ reply: consuming Reply
) {
    guard let node = context.node(number) else { return reply.status(EPERM) }
    do throws(SystemError) {
        let present = try status(of: node, context)
        guard permits(wanted, mask, instead: present) else { return reply.status(EPERM) }
        if mask & FUSE_SET_ATTR_SIZE != 0 {
            guard wanted.st_size >= 0 else { return reply.status(EINVAL) }
            try node.pointee.truncate(
                to: UInt64(clamping: wanted.st_size), isReadOnly: context.isReadOnly)
        }
        let status = try status(of: node, context)
        // While the kernel has the wrong size, it is to ask again each time.
        let isWrong = context.writesBack && context.ownAccess.isRestoring(number)
        reply.attributes(status, validFor: isWrong ? 0 : context.attributeValidity)
    } catch {
        reply.status(error.code)
    }
}

/// Whether owner, group and mode stay as they are: those are chosen at the mount.
private func permits(_ wanted: stat, _ mask: Int32, instead present: stat) -> Bool {
    if mask & FUSE_SET_ATTR_MODE != 0, wanted.st_mode & 0o7777 != present.st_mode & 0o7777 {
        return false
    }
    if mask & FUSE_SET_ATTR_UID != 0, wanted.st_uid != present.st_uid { return false }
    if mask & FUSE_SET_ATTR_GID != 0, wanted.st_gid != present.st_gid { return false }
    return true
}

func answerSpace(
    _ number: fuse_ino_t, _ context: borrowing MountContext, _ reply: consuming Reply
) {
    var report = statvfs()
    let space =
        context.node(number)?.pointee.space()
        ?? context.catalogue.disks.compactMap { $0.pointer.pointee.space() }.summed
    report.f_bsize = UInt(clamping: space.unitByteCount)
    report.f_frsize = report.f_bsize
    report.f_blocks = fsblkcnt_t(space.unitCount)
    report.f_bfree = fsblkcnt_t(space.freeUnitCount)
    report.f_bavail = report.f_bfree
    report.f_namemax = 255
    reply.space(report)
}

extension [SpaceReport] {
    /// All of them as one: in the largest unit, so that what is discarded by it is whole clusters.
    fileprivate var summed: SpaceReport {
        let unit = map(\.unitByteCount).max() ?? 4096
        return reduce(into: SpaceReport(unitByteCount: unit, unitCount: 0, freeUnitCount: 0)) {
            let scale = unit / Swift.max($1.unitByteCount, 1)
            $0.unitCount &+= $1.unitCount / Swift.max(scale, 1)
            $0.freeUnitCount &+= $1.freeUnitCount / Swift.max(scale, 1)
        }
    }
}

extension FileNode {
    /// Asks the open image, or has a look at the one that nobody has opened.
    borrowing func attributes() throws(SystemError) -> ImageAttributes {
        if let attributes = withOpenImage({ $0.pointee.attributes() }) { return attributes }
        return try source.peek()
    }

    borrowing func space() -> SpaceReport? { withOpenImage { $0.pointee.space() } }

    borrowing func truncate(to size: UInt64, isReadOnly: Bool) throws(SystemError) {
        guard !isReadOnly, !source.isReadOnly else { throw .readOnly }
        // Opened as by a client, for a change of size may come without an open file.
        let opening = try open(isWriter: true, prefersDirect: false)
        defer { close(isWriter: true, mode: opening.mode) }
        _ = try opening.image.pointer.pointee.truncate(to: size)
    }
}
