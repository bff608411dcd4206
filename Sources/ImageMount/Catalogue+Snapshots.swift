internal import Glibc
internal import Logging
internal import QCOW2

/// The snapshots that a mount shows beside its disks.
extension Catalogue {
    /// The snapshots of the disk called `name`, by the names that they are shown under.
    func snapshots(ofDisk name: String, taken: Set<String> = []) -> [String: Snapshot] {
        guard showsSnapshots, let disk = lookUpDisk(name) else { return [:] }
        return SnapshotNames.names(
            of: disk.pointer.pointee.snapshots(), beside: name, taken: taken)
    }

    /// The file of a snapshot called `name`; a disk's name may have an `@` itself.
    func lookUpSnapshot(_ name: String) -> NodeAddress? {
        guard showsSnapshots, name.hasSuffix(".raw"), name.contains("@") else { return nil }
        let taken = Set(listDisks().map(\.name))
        for place in name.indices where name[place] == "@" {
            let diskName = String(name[..<place]) + ".raw"
            if let snapshot = snapshots(ofDisk: diskName, taken: taken)[name],
                let disk = lookUpDisk(diskName)
            {
                return node(named: name, for: snapshot, of: disk)
            }
        }
        return nil
    }

    func snapshotEntries(besides disks: [Entry]) -> [Entry] {
        guard showsSnapshots else { return [] }
        let taken = Set(disks.map(\.name))
        return disks.flatMap { disk in
            snapshots(ofDisk: disk.name, taken: taken).keys.map {
                Entry(name: $0, inodeNumber: ExposedName.inodeNumber(of: $0))
            }
        }
    }
}

extension FileNode {
    /// The snapshots of the disk, its image open or not.
    borrowing func snapshots() -> [Snapshot] {
        let open = withOpenImage { mounted -> [Snapshot] in
            do throws(ImageError) {
                return try mounted.pointee.image.snapshots()
            } catch {
                mounted.pointee.log.report(error)
                return []
            }
        }
        if let open { return open }
        guard case .image(let opener) = source else { return [] }
        do throws(ImageError) {
            return try ImageInfo(path: opener.path, locking: .forceShare).snapshots
        } catch {
            opener.openOptions.logger.warning("\(error)")
            return []
        }
    }
}
