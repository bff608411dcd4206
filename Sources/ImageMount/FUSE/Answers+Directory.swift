internal import CFuse3
internal import Glibc
internal import QCOW2

func answerLookUp(
    _ name: UnsafePointer<CChar>, _ context: borrowing MountContext, _ reply: consuming Reply
) {
    guard let name = String(validatingCString: name), let node = context.catalogue.lookUp(name)
    else { return reply.status(ENOENT) }
    do throws(SystemError) {
        var entry = fuse_entry_param()
        entry.ino = context.number(of: node.pointer)
        entry.attr = try status(of: node.pointer, context)
        entry.attr_timeout = context.attributeValidity
        entry.entry_timeout = context.nameValidity
        reply.entry(entry)
    } catch {
        reply.status(error.code)
    }
}

/// What one reader of the directory goes through: the names as they were when it was opened.
private final class Listing: Sendable {
    let entries: [Catalogue.Entry]

    init(_ entries: [Catalogue.Entry]) {
        let itself = Catalogue.Entry(name: ".", inodeNumber: UInt64(FUSE_ROOT_ID))
        let parent = Catalogue.Entry(name: "..", inodeNumber: UInt64(FUSE_ROOT_ID))
        self.entries = [itself, parent] + entries
    }
}

func answerOpenDirectory(
    _ info: UnsafeMutablePointer<fuse_file_info>, _ context: borrowing MountContext,
    _ reply: consuming Reply
) {
    guard context.rootFile == nil else { return reply.status(ENOTDIR) }
    let listing = Unmanaged.passRetained(Listing(context.catalogue.list()))
    let word = UInt64(UInt(bitPattern: listing.toOpaque()))
    if !reply.opened(word, flags: 0) { listing.release() }
}

func closeListing(_ info: UnsafeMutablePointer<fuse_file_info>) {
    guard let address = UnsafeRawPointer(bitPattern: UInt(info.pointee.fh)) else { return }
    Unmanaged<Listing>.fromOpaque(address).release()
}

/// Answers as many names from the `offset`th on as fit into `count` bytes.
func serveDirectory(
    _ request: fuse_req_t?, count: Int, from offset: off_t,
    _ info: UnsafeMutablePointer<fuse_file_info>?
) {
    guard let request else { return }
    guard let info, let address = UnsafeRawPointer(bitPattern: UInt(info.pointee.fh)) else {
        return Reply(request).status(EBADF)
    }
    let entries = Unmanaged<Listing>.fromOpaque(address).takeUnretainedValue().entries
    guard count > 0, let room = malloc(count) else { return Reply(request).status(ENOMEM) }
    defer { free(room) }
    let text = room.assumingMemoryBound(to: CChar.self)
    var used = 0
    for index in entries.indices.dropFirst(Int(clamping: max(offset, 0))) {
        var status = stat()
        status.st_ino = ino_t(entries[index].inodeNumber)
        status.st_mode = index < 2 ? S_IFDIR : S_IFREG
        let needed = fuse_add_direntry(
            request, text + used, count - used, entries[index].name, &status, off_t(index + 1))
        guard needed <= count - used else { break }
        used += needed
    }
    Reply(request).data(UnsafeRawBufferPointer(start: room, count: used))
}
