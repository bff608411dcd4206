internal import Glibc
internal import QCOW2

/// An image's description in the words and keys of `qemu-img info`.
enum InfoReport {
    static func json(_ info: ImageInfo) -> JSON {
        let header = info.header
        return .members([
            "filename": .string(info.path),
            "format": .string(info.format.rawValue),
            "virtual-size": .number(info.virtualByteCount),
            "actual-size": .number(info.allocatedByteCount),
            "cluster-size": header.map { .number($0.clusterByteCount) },
            "dirty-flag": .boolean(header?.isDirty ?? false),
            "encrypted": header?.isEncrypted == true ? .boolean(true) : nil,
            "backing-filename": header?.backingFile.map(JSON.string),
            "full-backing-filename": info.backingPath.map(JSON.string),
            "backing-filename-format": header?.backingFormat.map(JSON.string),
            "snapshots": info.snapshots.isEmpty ? nil : .array(info.snapshots.map(json)),
            "format-specific": header.map { header in
                .object([("type", .string("qcow2")), ("data", specifics(header, info))])
            },
        ])
    }

    static func json(_ snapshot: Snapshot) -> JSON {
        .members([
            "id": .string(snapshot.id),
            "name": .string(snapshot.name),
            "vm-state-size": .number(snapshot.vmStateByteCount),
            "date-sec": .number(UInt64(snapshot.seconds)),
            "date-nsec": .number(UInt64(snapshot.nanoseconds)),
            "vm-clock-sec": .number(snapshot.guestClockNanoseconds / 1_000_000_000),
            "vm-clock-nsec": .number(snapshot.guestClockNanoseconds % 1_000_000_000),
            "icount": snapshot.instructionCount.map(JSON.number),
        ])
    }

    private static func specifics(_ header: Header, _ info: ImageInfo) -> JSON {
        let bitmaps = info.bitmaps
        let features = header.incompatibleFeatures
        let isVersion3 = header.version >= 3
        return .members([
            "compat": .string(isVersion3 ? "1.1" : "0.10"),
            "compression-type": .string(header.compressionType == .zstd ? "zstd" : "zlib"),
            "lazy-refcounts": isVersion3
                ? .boolean(header.compatibleFeatures.contains(.lazyRefcounts)) : nil,
            "bitmaps": bitmaps.isEmpty ? nil : .array(bitmaps.map(json)),
            "refcount-bits": .number(UInt64(header.refcountBits)),
            "data-file": header.dataFileName.map(JSON.string),
            "data-file-raw": header.hasDataFile ? .boolean(header.hasRawDataFile) : nil,
            "encrypt": encryption(info),
            "corrupt": isVersion3 ? .boolean(features.contains(.corrupt)) : nil,
            "extended-l2": isVersion3 ? .boolean(features.contains(.extendedL2)) : nil,
        ])
    }

    private static func json(_ bitmap: BitmapEntry) -> JSON {
        let flags = (bitmap.isInUse ? ["in-use"] : []) + (bitmap.isAuto ? ["auto"] : [])
        return .object([
            ("flags", .array(flags.map(JSON.string))), ("name", .string(bitmap.name)),
            ("granularity", .number(1 << UInt64(bitmap.granularityBits))),
        ])
    }
}

// MARK: - For people

extension InfoReport {
    static func text(_ info: ImageInfo) -> String {
        var lines = [
            "image: \(Failure.oneLine(info.path))",
            "file format: \(info.format.rawValue)",
            "virtual size: \(ByteSize(byteCount: info.virtualByteCount)) "
                + "(\(info.virtualByteCount) bytes)",
            "disk size: \(ByteSize(byteCount: info.allocatedByteCount))",
        ]
        guard let header = info.header else { return lines.joined(separator: "\n") }
        if header.isEncrypted { lines.append("encrypted: yes") }
        lines.append("cluster_size: \(header.clusterByteCount)")
        if header.isDirty { lines.append("cleanly shut down: no") }
        lines += backingLines(info)
        lines += snapshotLines(info.snapshots)
        lines.append("Format specific information:")
        if case .object(let members) = specifics(header, info) {
            lines += nestedLines(members, indent: "    ")
        }
        return lines.joined(separator: "\n")
    }

    private static func backingLines(_ info: ImageInfo) -> [String] {
        guard let header = info.header, let name = header.backingFile else { return [] }
        var line = "backing file: \(Failure.oneLine(name))"
        if let path = info.backingPath, path != name {
            line += " (actual path: \(Failure.oneLine(path)))"
        }
        let format = header.backingFormat.map { "backing file format: \(Failure.oneLine($0))" }
        return [line] + [format].compactMap { $0 }
    }

    static func snapshotLines(_ snapshots: [Snapshot]) -> [String] {
        guard !snapshots.isEmpty else { return [] }
        return [
            "Snapshot list:",
            row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"),
        ]
            + snapshots.map { snapshot in
                row(
                    Failure.oneLine(snapshot.id), Failure.oneLine(snapshot.name),
                    "\(ByteSize(byteCount: snapshot.vmStateByteCount))", date(snapshot.seconds),
                    clock(snapshot.guestClockNanoseconds),
                    snapshot.instructionCount.map(String.init) ?? "")
            }
    }

    private static func row(
        _ id: String, _ name: String, _ size: String, _ date: String, _ clock: String,
        _ count: String
    ) -> String {
        padded(id, after: 9) + " " + padded(name, after: 16) + padded(size, before: 9)
            + padded(date, before: 20) + padded(clock, before: 13) + padded(count, before: 11)
    }

    private static func padded(_ text: String, after width: Int) -> String {
        text + String(repeating: " ", count: max(0, width - text.count))
    }

    private static func padded(_ text: String, before width: Int) -> String {
        String(repeating: " ", count: max(0, width - text.count)) + text
    }

    /// Local time, as a wall clock shows it.
    private static func date(_ seconds: UInt32) -> String {
        var time = time_t(seconds)
        var parts = tm()
        guard localtime_r(&time, &parts) != nil else { return "" }
        return "\(parts.tm_year + 1900)-\(two(parts.tm_mon + 1))-\(two(parts.tm_mday)) "
            + "\(two(parts.tm_hour)):\(two(parts.tm_min)):\(two(parts.tm_sec))"
    }

    private static func clock(_ nanoseconds: UInt64) -> String {
        let milliseconds = nanoseconds / 1_000_000
        let seconds = milliseconds / 1000
        let fraction = String(milliseconds % 1000)
        return "\(two(seconds / 3600)):\(two(seconds / 60 % 60)):\(two(seconds % 60))."
            + String(repeating: "0", count: 3 - fraction.count) + fraction
    }

    private static func two(_ number: some BinaryInteger) -> String {
        number < 10 ? "0\(number)" : "\(number)"
    }

    /// Nested facts: a key's words, and deeper ones below it; elements are numbered.
    private static func nestedLines(
        _ members: [(key: String, value: JSON)], indent: String
    ) -> [String] {
        members.flatMap { key, value in
            let words = String(key.map { $0 == "-" ? " " : $0 })
            switch value {
            case .object(let members):
                return ["\(indent)\(words):"] + nestedLines(members, indent: indent + "    ")
            case .array(let elements):
                let numbered = elements.enumerated().map { (key: "[\($0)]", value: $1) }
                return ["\(indent)\(words):"] + nestedLines(numbered, indent: indent + "    ")
            case .string(let string): return ["\(indent)\(words): \(Failure.oneLine(string))"]
            case .number(let number): return ["\(indent)\(words): \(number)"]
            case .boolean(let boolean): return ["\(indent)\(words): \(boolean)"]
            }
        }
    }
}

extension Header {
    fileprivate var isDirty: Bool { incompatibleFeatures.contains(.dirty) }
    fileprivate var isEncrypted: Bool { encryptionMethod != 0 }
}
