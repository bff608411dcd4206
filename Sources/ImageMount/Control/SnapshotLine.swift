internal import QCOW2

/// A snapshot as a line of an answer over the control socket.
enum SnapshotLine {
    static func text(_ snapshot: Snapshot) -> String {
        let numbers: [UInt64] = [
            UInt64(snapshot.seconds), UInt64(snapshot.nanoseconds), snapshot.guestClockNanoseconds,
            snapshot.vmStateByteCount, snapshot.diskByteCount ?? .max,
            snapshot.instructionCount ?? .max,
        ]
        return
            ([snapshot.idBytes, snapshot.nameBytes].map { ControlWords.encoded($0) }
            + numbers.map(String.init)).joined(separator: " ")
    }

    static func snapshot(_ text: String) -> Snapshot? {
        let words = text.split(separator: " ")
        guard words.count == 8, let id = ControlWords.decoded(words[0]),
            let name = ControlWords.decoded(words[1])
        else { return nil }
        let numbers = words.dropFirst(2).compactMap { UInt64($0) }
        guard numbers.count == 6 else { return nil }
        return Snapshot(
            l1Offset: 0, l1EntryCount: 0, idBytes: id, nameBytes: name,
            seconds: UInt32(clamping: numbers[0]), nanoseconds: UInt32(clamping: numbers[1]),
            guestClockNanoseconds: numbers[2], vmStateByteCount: numbers[3],
            diskByteCount: numbers[4] == .max ? nil : numbers[4],
            instructionCount: numbers[5] == .max ? nil : numbers[5], extraData: [])
    }
}
