/// The metadata that a repair replaced, in a file beside the image.
///
/// All numbers are big-endian: the magic, the image's length in bytes, then records of an offset,
/// a length, the bytes before and the bytes after the repair.
enum UndoFile {
    /// A name beside the image at `path` that no file has yet.
    static func freePath(for path: String) -> String {
        var candidate = path + ".undo"
        var number = 1
        while FileDevice.Identity(ofFileAt: candidate) != nil {
            number += 1
            candidate = "\(path).undo-\(number)"
        }
        return candidate
    }

    private static let magic = Array("qcowfs undo 1\n\0\0".utf8)

    /// Writes what `edits` replace, or may replace, to a new file at `path`.
    static func write(
        _ edits: some Sequence<RepairPlan.Edit>, of device: any BlockDevice, to path: String
    ) throws(ImageError) {
        let target = try FileReplacement(of: path)
        let file = target.device
        do throws(SystemError) {
            var end: UInt64 = 0
            func append(_ bytes: [UInt8]) throws(SystemError) {
                try bytes.withRawBytes { bytes throws(SystemError) in
                    try file.write(bytes, at: end)
                }
                end += UInt64(bytes.count)
            }
            let length = try device.byteCount()
            try append(magic + bigEndian(length))
            for edit in edits {
                var old = [UInt8](repeating: 0, count: edit.bytes.count)
                try old.withMutableRawBytes { buffer throws(SystemError) in
                    try device.readPadded(into: buffer, at: edit.offset)
                }
                try append(bigEndian(edit.offset) + bigEndian(UInt64(old.count)))
                try append(old)
                try append(edit.bytes)
            }
        } catch {
            throw ImageError(.system(error, operation: "cannot write"), file: path)
        }
        try target.commit()
    }

    /// Puts back what the file at `path` holds, if nothing but the repair, which may have been
    /// interrupted, has changed it since.
    static func restore(
        _ path: String, to device: any BlockDevice
    ) throws(ImageError) {
        let file = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        defer { file.close() }
        let records = try readRecords(of: file)
        do throws(SystemError) {
            for group in overlapping(records.edits) where try !isUntouched(group, on: device) {
                throw SystemError(code: 116)  // ESTALE
            }
            for record in records.edits {
                try record.old.withRawBytes { bytes throws(SystemError) in
                    try device.write(bytes, at: record.offset)
                }
            }
            if try device.byteCount() > records.length { try device.resize(to: records.length) }
            try device.flush()
        } catch {
            guard error.code != 116 else {
                throw ImageError(
                    .invalidArgument(
                        "was changed after the repair: \(path) cannot be put back"),
                    file: device.name)
            }
            throw ImageError(.system(error, operation: "cannot put back"), file: device.name)
        }
    }

    /// Records in groups whose places overlap, because one step changed what another had written.
    private static func overlapping(_ records: [Record]) -> [[Record]] {
        var groups: [[Record]] = []
        var end: UInt64 = 0
        for record in records.sorted(by: { $0.offset < $1.offset }) {
            if record.offset < end {
                groups[groups.count - 1].append(record)
            } else {
                groups.append([record])
            }
            end = max(end, record.end)
        }
        return groups
    }

    /// Whether each byte is what one of the records of a group says, before or after.
    private static func isUntouched(
        _ group: [Record], on device: any BlockDevice
    ) throws(SystemError) -> Bool {
        guard let start = group.first?.offset, let end = group.map(\.end).max() else { return true }
        var now = [UInt8](repeating: 0, count: Int(end - start))
        try now.withMutableRawBytes { buffer throws(SystemError) in
            try device.readPadded(into: buffer, at: start)
        }
        var isKnown = [Bool](repeating: false, count: now.count)
        for record in group {
            let first = Int(record.offset - start)
            for (index, (old, new)) in zip(record.old, record.new).enumerated()
            where now[first + index] == old || now[first + index] == new {
                isKnown[first + index] = true
            }
        }
        return isKnown.allSatisfy { $0 }
    }

    private struct Record {
        let offset: UInt64
        let old: [UInt8]
        let new: [UInt8]

        var end: UInt64 { offset &+ UInt64(new.count) }
    }

    private static func readRecords(
        of file: FileDevice
    ) throws(ImageError) -> (length: UInt64, edits: [Record]) {
        let strange = ImageError(
            .invalidArgument("is not what a repair of qcowfs has saved"), file: file.name)
        let byteCount: UInt64
        do throws(SystemError) {
            byteCount = try file.byteCount()
        } catch {
            throw ImageError(.system(error, operation: "cannot read"), file: file.name)
        }
        guard byteCount >= UInt64(magic.count + 8), byteCount < 1 << 32 else { throw strange }
        let bytes = try Header.read(Int(byteCount), at: 0, of: file)
        guard Array(bytes.prefix(magic.count)) == magic else { throw strange }
        func number(_ position: Int) -> UInt64? {
            bytes.withRawBytes { $0.bigEndian(at: position, as: UInt64.self) }
        }
        guard let length = number(magic.count) else { throw strange }
        var records: [Record] = []
        var position = magic.count + 8
        while position < bytes.count {
            guard let offset = number(position), let stored = number(position + 8),
                let count = Int(exactly: stored), count <= (bytes.count - position - 16) / 2,
                offset <= UInt64(Int64.max) - stored
            else { throw strange }
            let start = position + 16
            records.append(
                Record(
                    offset: offset, old: Array(bytes[start..<start + count]),
                    new: Array(bytes[start + count..<start + 2 * count])))
            position = start + 2 * count
        }
        return (length, records)
    }

    private static func bigEndian(_ number: UInt64) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 8)
        bytes.storeBigEndian(number, at: 0)
        return bytes
    }
}
