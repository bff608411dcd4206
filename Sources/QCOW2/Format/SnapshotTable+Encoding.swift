// New entries of the snapshot table, and the bytes of a table.

extension Snapshot {
    /// Bytes of the extra data that we write: VM state size, disk size, instruction count.
    static let writtenExtraByteCount = 24

    /// An entry without VM state; its L1 table is placed later.
    package init(
        id: String, name: String, seconds: UInt32, nanoseconds: UInt32, diskByteCount: UInt64
    ) {
        var extra = [UInt8](repeating: 0, count: Snapshot.writtenExtraByteCount)
        extra.storeBigEndian(diskByteCount, at: 8)
        extra.storeBigEndian(UInt64.max, at: 16)  // no instructions were counted
        self.init(
            l1Offset: 0, l1EntryCount: 0, idBytes: Array(id.utf8), nameBytes: Array(name.utf8),
            seconds: seconds, nanoseconds: nanoseconds, guestClockNanoseconds: 0,
            vmStateByteCount: 0, diskByteCount: diskByteCount, instructionCount: nil,
            extraData: extra)
    }

    /// The bytes of a table with these entries, each padded to a multiple of 8.
    package static func encodeTable(_ snapshots: [Snapshot]) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(snapshots.tableByteCount)
        for snapshot in snapshots { bytes += snapshot.encoded() }
        return bytes
    }

    private func encoded() -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Snapshot.fixedByteCount)
        bytes.storeBigEndian(l1Offset, at: 0)
        bytes.storeBigEndian(l1EntryCount, at: 8)
        // What was parsed fits: lengths come from fields as wide as these.
        bytes.storeBigEndian(UInt16(clamping: idBytes.count), at: 12)
        bytes.storeBigEndian(UInt16(clamping: nameBytes.count), at: 14)
        bytes.storeBigEndian(seconds, at: 16)
        bytes.storeBigEndian(nanoseconds, at: 20)
        bytes.storeBigEndian(guestClockNanoseconds, at: 24)
        bytes.storeBigEndian(UInt32(exactly: vmStateByteCount) ?? 0, at: 32)
        bytes.storeBigEndian(UInt32(clamping: extraData.count), at: 36)
        bytes += extraData
        bytes += idBytes
        bytes += nameBytes
        bytes += repeatElement(0, count: byteCount - bytes.count)
        return bytes
    }
}

extension Array where Element == Snapshot {
    /// Bytes of a table with these entries.
    package var tableByteCount: Int { reduce(0) { $0 &+ $1.byteCount } }

    /// The number behind the highest one that an identifier begins with, as QEMU counts on.
    package var nextID: String {
        var highest: UInt64 = 0
        for snapshot in self {
            let digits = snapshot.idBytes.prefix { (0x30...0x39).contains($0) }
            let number = UInt64(String(decoding: digits, as: UTF8.self)) ?? 0
            if number < .max { highest = Swift.max(highest, number) }
        }
        return String(highest &+ 1)
    }

    /// The snapshot that `word` means where one is read or applied: by identifier, then by name.
    package func find(_ word: String) -> Snapshot? {
        let bytes = [UInt8](word.utf8)
        return first { $0.idBytes == bytes } ?? first { $0.nameBytes == bytes }
    }

    /// The snapshot that `word` means where one is deleted: a name goes before an identifier, so
    /// that nobody loses another snapshot than the one that QEMU would delete.
    package func findForDeletion(_ word: String) -> Snapshot? {
        let bytes = [UInt8](word.utf8)
        return first { $0.nameBytes == bytes } ?? first { $0.idBytes == bytes }
    }
}
