internal import Glibc
internal import Logging
internal import QCOW2
internal import Synchronization

/// Which files a mount shows.
final class Catalogue: Sendable {
    enum Shape: Sendable {
        /// The mountpoint itself is the one file.
        case file
        /// The mountpoint is a directory of the images that were named.
        case directory
        /// The mountpoint shows every qcow2 file of a directory, as they come and go.
        case mirror(of: ImageDirectory)
    }

    let shape: Shape
    /// What the mountpoint shows, in the words of a mount table: the images' paths.
    let source: String
    /// Whether snapshots appear beside their disks.
    let showsSnapshots: Bool
    private let nodes: Mutex<[String: NodeAddress]>

    init(
        _ shape: Shape, source: String, showsSnapshots: Bool = false, nodes: [NodeAddress] = []
    ) {
        self.shape = shape
        self.source = source
        self.showsSnapshots = showsSnapshots
        let named = nodes.map { ($0.pointer.pointee.name, $0) }
        self.nodes = Mutex(Dictionary(named, uniquingKeysWith: { first, _ in first }))
    }

    /// Whether files come and go by themselves, so that the kernel must ask again.
    var changesByItself: Bool { isMirror || showsSnapshots }

    var isMirror: Bool {
        if case .mirror = shape { true } else { false }
    }

    /// The file that is the mountpoint itself; nil where that is a directory.
    var rootFile: NodeAddress? {
        guard case .file = shape else { return nil }
        return allNodes.first
    }

    /// Every file that was ever shown.
    var allNodes: [NodeAddress] { nodes.withLock { Array($0.values) } }

    /// Those of them that are the disks of images.
    var disks: [NodeAddress] { allNodes.filter { !$0.pointer.pointee.source.isReadOnly } }

    /// The file called `name`.
    func lookUp(_ name: String) -> NodeAddress? { lookUpDisk(name) ?? lookUpSnapshot(name) }

    func lookUpDisk(_ name: String) -> NodeAddress? {
        if case .mirror(let directory) = shape {
            guard let found = directory.image(exposedAs: name) else { return nil }
            return node(for: found, in: directory)
        }
        let node = nodes.withLock { $0[name] }
        return node.flatMap { $0.pointer.pointee.source.isReadOnly ? nil : $0 }
    }

    /// The files there are, sorted by name.
    func list() -> [Entry] {
        let disks = listDisks()
        return (disks + snapshotEntries(besides: disks)).sorted { $0.name < $1.name }
    }

    func listDisks() -> [Entry] {
        if case .mirror(let directory) = shape {
            directory.images().map {
                Entry(name: $0.name, inodeNumber: ExposedName.inodeNumber(of: $0.name))
            }
        } else {
            disks.map {
                Entry(name: $0.pointer.pointee.name, inodeNumber: $0.pointer.pointee.inodeNumber)
            }
        }
    }

    struct Entry: Sendable {
        let name: String
        let inodeNumber: UInt64
    }

    /// The node of a snapshot: the one it had, or a new one.
    func node(named name: String, for snapshot: Snapshot, of disk: NodeAddress) -> NodeAddress {
        nodes.withLock { nodes in
            if let known = nodes[name], case .snapshot(let source) = known.pointer.pointee.source,
                source.snapshot == snapshot, source.disk.pointer == disk.pointer
            {
                return known
            }
            // The one it replaces stays where it is: the kernel may still call it by its address.
            let node = NodeAddress(
                FileNode(name: name, snapshot: SnapshotSource(disk: disk, snapshot: snapshot)))
            nodes[name] = node
            return node
        }
    }

    /// The node of an image in the mirrored directory: the one it had, or a new one.
    private func node(for found: ImageDirectory.Found, in directory: ImageDirectory) -> NodeAddress
    {
        nodes.withLock { nodes in
            if let known = nodes[found.name], known.pointer.pointee.identity == found.identity {
                return known
            }
            // The one it replaces stays where it is: the kernel may still call it by its address.
            let node = NodeAddress(
                FileNode(
                    name: found.name, opener: directory.opener(for: found.path),
                    identity: found.identity))
            nodes[found.name] = node
            return node
        }
    }
}

/// Where a file of the mount lies; it stays there until the process ends.
struct NodeAddress: @unchecked Sendable {
    // Sendable: what lies there is, and the address never changes.
    let pointer: UnsafeMutablePointer<FileNode>

    init(_ node: consuming FileNode) {
        pointer = .allocate(capacity: 1)
        pointer.initialize(to: node)
    }

    init(pointer: UnsafeMutablePointer<FileNode>) { self.pointer = pointer }
}
