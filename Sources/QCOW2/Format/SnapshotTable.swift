/// One entry of the snapshot table (specification, "Snapshots").
public struct Snapshot: Sendable, Hashable {
    /// Host offset of the snapshot's L1 table.
    public var l1Offset: UInt64
    /// Entries of 8 bytes of the snapshot's L1 table.
    public var l1EntryCount: UInt32
    /// The identifier as stored: UTF-8 by convention, but nobody says so.
    public var idBytes: [UInt8]
    /// The name as stored, any bytes.
    public var nameBytes: [UInt8]
    /// When it was made, in seconds since 1970.
    public var seconds: UInt32
    /// Nanoseconds within that second.
    public var nanoseconds: UInt32
    /// The time that the guest had run for, in nanoseconds.
    public var guestClockNanoseconds: UInt64
    /// Bytes of VM state.
    public var vmStateByteCount: UInt64
    /// Bytes of the virtual disk then; nil in version 2 tables without extra data.
    public var diskByteCount: UInt64?
    /// Instruction count; nil where none is stored.
    public var instructionCount: UInt64?
    /// The extra data as stored, kept on every rewrite.
    public var extraData: [UInt8]

    package init(
        l1Offset: UInt64, l1EntryCount: UInt32, idBytes: [UInt8], nameBytes: [UInt8],
        seconds: UInt32, nanoseconds: UInt32, guestClockNanoseconds: UInt64,
        vmStateByteCount: UInt64, diskByteCount: UInt64?, instructionCount: UInt64?,
        extraData: [UInt8]
    ) {
        self.l1Offset = l1Offset
        self.l1EntryCount = l1EntryCount
        self.idBytes = idBytes
        self.nameBytes = nameBytes
        self.seconds = seconds
        self.nanoseconds = nanoseconds
        self.guestClockNanoseconds = guestClockNanoseconds
        self.vmStateByteCount = vmStateByteCount
        self.diskByteCount = diskByteCount
        self.instructionCount = instructionCount
        self.extraData = extraData
    }

    /// The identifier for people; bytes that are no UTF-8 are replaced in it.
    public var id: String { String(decoding: idBytes, as: UTF8.self) }
    /// The name for people; bytes that are no UTF-8 are replaced in it.
    public var name: String { String(decoding: nameBytes, as: UTF8.self) }

    /// Bytes of the entry with its padding.
    package var byteCount: Int {
        (Snapshot.fixedByteCount + extraData.count + idBytes.count + nameBytes.count + 7) & ~7
    }

    /// Bytes of an entry before its extra data.
    static let fixedByteCount = 40

    /// Parses `count` entries; `bytes` start at the table and may end before the last padding.
    /// Returns them and the number of bytes they take.
    package static func parseTable(
        _ bytes: UnsafeRawBufferPointer, count: Int
    ) throws(FormatError) -> (snapshots: [Snapshot], byteCount: Int) {
        var snapshots: [Snapshot] = []
        var offset = 0
        for _ in 0..<count {
            let (snapshot, length) = try parseEntry(bytes, at: offset)
            snapshots.append(snapshot)
            offset &+= (length &+ 7) & ~7  // bounded by bytes.count + 7
        }
        return (snapshots, offset)
    }

    /// The entries up to the first one that makes no sense, at most `count`.
    package static func parsePrefix(
        _ bytes: UnsafeRawBufferPointer, count: Int
    ) -> [Snapshot] {
        var snapshots: [Snapshot] = []
        var offset = 0
        do throws(FormatError) {
            while snapshots.count < count {
                let (snapshot, length) = try parseEntry(bytes, at: offset)
                snapshots.append(snapshot)
                offset &+= (length &+ 7) & ~7  // bounded by bytes.count + 7
            }
        } catch {}
        return snapshots
    }

    /// Parses the entry at `offset`; throws `.truncated` where `bytes` end before it does.
    private static func parseEntry(
        _ bytes: UnsafeRawBufferPointer, at offset: Int
    ) throws(FormatError) -> (Snapshot, byteCount: Int) {
        guard let l1Offset = bytes.bigEndian(at: offset, as: UInt64.self),
            let l1EntryCount = bytes.bigEndian(at: offset &+ 8, as: UInt32.self),
            let idLength = bytes.bigEndian(at: offset &+ 12, as: UInt16.self),
            let nameLength = bytes.bigEndian(at: offset &+ 14, as: UInt16.self),
            let seconds = bytes.bigEndian(at: offset &+ 16, as: UInt32.self),
            let nanoseconds = bytes.bigEndian(at: offset &+ 20, as: UInt32.self),
            let clock = bytes.bigEndian(at: offset &+ 24, as: UInt64.self),
            let stateLength = bytes.bigEndian(at: offset &+ 32, as: UInt32.self),
            let extraLength = bytes.bigEndian(at: offset &+ 36, as: UInt32.self)
        else {
            throw .truncated(
                "snapshot table", needed: UInt64(offset &+ 40), found: UInt64(bytes.count))
        }
        guard UInt64(extraLength) <= Limits.snapshotExtraByteCount else {
            throw .tooLarge(
                "snapshot's extra data", value: UInt64(extraLength),
                limit: Limits.snapshotExtraByteCount)
        }
        let extraStart = offset &+ 40
        let idStart = extraStart &+ Int(extraLength)
        let nameStart = idStart &+ Int(idLength)
        let end = nameStart &+ Int(nameLength)
        guard end <= bytes.count else {
            throw .truncated("snapshot table", needed: UInt64(end), found: UInt64(bytes.count))
        }
        let extra = UnsafeRawBufferPointer(rebasing: bytes[extraStart..<idStart])
        let icount = extra.bigEndian(at: 16, as: UInt64.self)
        let snapshot = Snapshot(
            l1Offset: l1Offset, l1EntryCount: l1EntryCount,
            idBytes: Array(bytes[idStart..<nameStart]), nameBytes: Array(bytes[nameStart..<end]),
            seconds: seconds, nanoseconds: nanoseconds, guestClockNanoseconds: clock,
            vmStateByteCount: extra.bigEndian(at: 0, as: UInt64.self) ?? UInt64(stateLength),
            diskByteCount: extra.bigEndian(at: 8, as: UInt64.self),
            instructionCount: icount == .max ? nil : icount, extraData: Array(extra))
        return (snapshot, end &- offset)
    }

    /// Throws where the snapshot's L1 table cannot be what it says.
    package func check(clusterByteCount: UInt64) throws(FormatError) {
        let byteCount = UInt64(l1EntryCount) &* 8
        guard byteCount <= Limits.l1ByteCount else {
            throw .tooLarge(
                "L1 table of snapshot \(id)", value: byteCount, limit: Limits.l1ByteCount)
        }
        guard l1Offset & (clusterByteCount &- 1) == 0, l1Offset < Limits.hostOffset else {
            throw .misaligned(
                "L1 table of snapshot \(id)", offset: l1Offset, alignment: clusterByteCount)
        }
    }
}
