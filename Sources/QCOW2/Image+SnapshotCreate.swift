internal import Glibc
internal import Logging

/// Making a snapshot, beside clients that go on reading and writing.
extension Image {
    /// A moment of the wall clock.
    public struct Moment: Sendable {
        /// Since 1970.
        public var seconds: UInt32
        /// Nanoseconds within that second.
        public var nanoseconds: UInt32

        /// A moment of the past, or of the future.
        public init(seconds: UInt32, nanoseconds: UInt32) {
            self.seconds = seconds
            self.nanoseconds = nanoseconds
        }

        /// What the system's clock says.
        public static var now: Moment {
            var time = timespec()
            clock_gettime(CLOCK_REALTIME, &time)
            return Moment(
                seconds: UInt32(truncatingIfNeeded: time.tv_sec),
                nanoseconds: UInt32(truncatingIfNeeded: time.tv_nsec))
        }
    }

    /// Keeps the disk as it is now under `name`, which another snapshot may have too.
    ///
    /// Clients go on: they wait for one short moment, in which the world stops.
    /// - Throws: `.invalidArgument` for a name that cannot be, a full snapshot table or refcounts
    ///   that are too narrow, all of it before anything is changed; `.corrupt`, `.system`.
    @discardableResult
    public func createSnapshot(
        _ name: String, at time: Moment = .now
    ) throws(ImageError) -> Snapshot {
        try checkSnapshotName(name)
        return try changeSnapshots { writing throws(ImageError) in
            let old = try snapshots()
            var new = Snapshot(
                id: old.nextID, name: name, seconds: time.seconds, nanoseconds: time.nanoseconds,
                diskByteCount: size)
            new.l1EntryCount = UInt32(truncatingIfNeeded: map.l1EntryCount)
            try checkTable(of: old + [new])
            try checkWidth(writing)
            try dropVMState(writing)
            try create(&new, after: old, writing)
            return new
        }
    }

    private func checkSnapshotName(_ name: String) throws(ImageError) {
        let limit = Limits.newSnapshotNameByteCount
        guard !name.isEmpty, name.utf8.count <= limit, !name.utf8.contains(0) else {
            throw ImageError(
                .invalidArgument("a snapshot's name has 1 to \(limit) bytes"), file: top.file.name)
        }
    }

    /// Narrow counters are looked at first, so that nothing has to be taken back.
    private func checkWidth(_ writing: Writing) throws(ImageError) {
        guard writing.allocator.format.order <= 3 else { return }
        try writing.commit.now()
        // No commit runs, so nothing that the file's tables refer to is given to anybody else.
        try writing.commit.excluding { () throws(ImageError) in
            try activeTree.forEachReference(.refused) { runs throws(ImageError) in
                try writing.allocator.checkRaising(runs)
            }
        }
    }

    /// The active tables, as the file has them.
    var activeTree: TableTree {
        TableTree(map.l1Entries().map(\.withoutCopied), in: top.file, header: header)
    }

    private func create(
        _ new: inout Snapshot, after old: [Snapshot], _ writing: Writing
    ) throws(ImageError) {
        let l1Room = try takeRoom(max(map.l1EntryCount, 1) * 8, writing)
        var tableRoom: ClusterRun?
        var isSwitched = false
        do throws(ImageError) {
            try writing.beginChange(header)
            new.l1Offset = (l1Room?.first ?? 0) &<< map.clusterBits
            tableRoom = try takeRoom((old + [new]).tableByteCount, writing)
            try capture(writing)
            // Most of what is dirty is written while clients go on.
            try writing.commit.now()
            ranges.lockEverything()
            defer { ranges.unlockEverything() }
            try writeTables(of: old + [new], new, at: tableRoom, writing)
            // From here on the snapshot may get to the disk, so nothing of it is taken back.
            isSwitched = true
            writing.capture.end()
            try switchTable(to: old + [new], at: tableRoom, writing)
        } catch {
            if !isSwitched { try giveUp([l1Room, tableRoom], writing) }
            throw error
        }
        try writing.endChange(header)
    }

    /// Live VM state belongs to no disk; the snapshot would keep it for ever.
    private func dropVMState(_ writing: Writing) throws(ImageError) {
        let needed = Int(header.l1EntryCountNeeded(for: size))
        guard map.nextTable(from: needed) < map.l1EntryCount else { return }
        ranges.lockEverything()
        defer { ranges.unlockEverything() }
        try dropTables(from: UInt64(needed), writing)
    }

    /// With the world stopped: counts what clients did meanwhile, and makes durable everything
    /// that the header is to refer to, with COPIED cleared in every active table.
    private func writeTables(
        of snapshots: [Snapshot], _ new: Snapshot, at room: ClusterRun?, _ writing: Writing
    ) throws(ImageError) {
        try followClients(writing)
        map.clearCopiedOfTables()
        try writeL1Table(map.l1Entries(), to: new.l1Offset, writing)
        try writeTable(of: snapshots, to: room, writing)
        try writing.commit.now()
    }

    func writeL1Table(
        _ entries: [L1Entry], to offset: UInt64, _ writing: Writing
    ) throws(ImageError) {
        var bytes = [UInt8](repeating: 0, count: entries.count * 8)
        bytes.withUnsafeMutableBytes { room in
            for (index, entry) in entries.enumerated() {
                room.storeBigEndian(entry.withoutCopied.bits, at: index * 8)
            }
        }
        if !bytes.isEmpty { try writing.file.write(bytes, at: offset) }
    }
}
