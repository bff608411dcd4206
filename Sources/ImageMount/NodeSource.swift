internal import Glibc
internal import QCOW2

/// What lies behind a file of a mount.
enum NodeSource: Sendable {
    /// An image: its disk.
    case image(ImageOpener)
    /// A snapshot of the image behind another file, read-only.
    case snapshot(SnapshotSource)

    var isReadOnly: Bool {
        if case .snapshot = self { true } else { false }
    }

    /// Opens it for a client while the mount is being served.
    func openWhileServing() throws(SystemError) -> ImageAddress {
        switch self {
        case .image(let opener): try opener.openWhileServing()
        case .snapshot(let source): try source.open()
        }
    }

    /// What was opened has been closed.
    func wasClosed() {
        if case .snapshot(let source) = self { source.disk.pointer.pointee.closeAfterFlushing() }
    }

    /// Size and times while nobody has opened it.
    func peek() throws(SystemError) -> ImageAttributes {
        switch self {
        case .image(let opener): try opener.peek()
        case .snapshot(let source): try source.peek()
        }
    }
}

/// How a snapshot beside its disk is opened: through the image of the disk, which stays open for
/// as long.
struct SnapshotSource: Sendable {
    let disk: NodeAddress
    let snapshot: Snapshot

    func open() throws(SystemError) -> ImageAddress {
        let opening = try disk.pointer.pointee.openForSnapshot()
        let mounted = opening.image.pointer
        do throws(ImageError) {
            let view = try mounted.pointee.image.openSnapshot(snapshot)
            view.startCountingAllocation()
            return ImageAddress(mounted.pointee.sharing(view))
        } catch {
            disk.pointer.pointee.closeAfterFlushing()
            // Whoever knew the name before it was deleted.
            if case .invalidArgument = error.kind { throw SystemError(code: ENOENT) }
            throw mounted.pointee.told(error)
        }
    }

    func peek() throws(SystemError) -> ImageAttributes {
        var attributes = try disk.pointer.pointee.attributes()
        attributes.size = (snapshot.diskByteCount ?? attributes.size) & ~511
        attributes.blockCount = min(attributes.blockCount, attributes.size / 512)
        return attributes
    }
}
