internal import QCOW2

/// The way of a byte, in lines for people and in lasting names of fields.
enum ExplainReport {
    // MARK: For people

    static func text(_ explanation: Explanation) -> String {
        var lines = ["byte \(explanation.offset) (\(hex(explanation.offset)))"]
        for (depth, layer) in explanation.layers.enumerated() {
            lines.append("")
            lines.append(title(layer))
            lines += steps(layer).map { "    " + $0 }
            let isLast = depth == explanation.layers.count - 1
            let goesOn = !isLast || explanation.obstacle != nil
            lines.append("  → " + outcome(layer, goesOn: goesOn))
        }
        return lines.map(Failure.oneLine).joined(separator: "\n")
    }

    private static func title(_ layer: Explanation.Layer) -> String {
        let disk = "\(ByteSize(byteCount: layer.virtualByteCount))"
        guard let cluster = layer.clusterByteCount else { return "\(layer.path) (raw, \(disk))" }
        return "\(layer.path) (qcow2, \(disk), clusters of \(ByteSize(byteCount: cluster)))"
    }

    private static func steps(_ layer: Explanation.Layer) -> [String] {
        var lines: [String] = []
        if let entry = layer.l1 {
            lines.append(line("L1", entry, entry.target == 0 ? "no L2 table" : "L2 table"))
        }
        if let entry = layer.l2 {
            lines.append(
                line("L2", entry, entry.isCompressed ? "stream" : entry.noun))
        }
        if let part = layer.subcluster {
            lines.append(
                "subcluster \(part.index): \(part.word) "
                    + "(allocated \(hex(UInt64(part.allocated))), zero \(hex(UInt64(part.zero))))")
        }
        if let stream = layer.stream {
            lines.append(
                "compressed with \(stream.type == .zstd ? "zstd" : "deflate"), "
                    + "at most \(stream.byteCount) bytes at \(hex(stream.offset))")
        }
        lines += layer.clusters.map { cluster in
            "host cluster \(hex(cluster.offset)): \(count(cluster.refcount))"
        }
        lines += layer.sharers.map { sharer in
            let what =
                sharer.sharesTable
                ? sharer.sharesCluster ? "table and cluster" : "table" : "cluster"
            return "shared with snapshot \(sharer.id) (\(sharer.name)): \(what)"
        }
        if let encryption = layer.encryption {
            let basis = encryption.method == .luks ? "of the file" : "of the disk"
            lines.append(
                "encrypted (\(encryption.method.rawValue)) as sector \(encryption.sector) \(basis)")
        }
        return lines
    }

    private static func line(
        _ table: String, _ entry: Explanation.TableEntry, _ noun: String
    ) -> String {
        var words = [noun + (entry.target == 0 ? "" : " at \(hex(entry.target))")]
        if entry.hasZeroFlag { words.append("reads as zeros") }
        if entry.isCopied { words.append("COPIED") }
        if entry.reservedBits != 0 { words.append("reserved bits \(hex(entry.reservedBits))") }
        if let refcount = entry.refcount { words.append(count(refcount)) }
        return "\(table) entry \(entry.index) at \(hex(entry.place)): \(digits(entry.bits)): "
            + words.joined(separator: ", ")
    }

    private static func outcome(_ layer: Explanation.Layer, goesOn: Bool) -> String {
        switch layer.answer {
        case .data:
            layer.place.map { "offset \($0.offset) (\(hex($0.offset))) of \($0.path)" } ?? "data"
        case .compressed:
            "byte \(layer.stream?.position ?? 0) of the cluster that comes out"
        case .zeroPlain: "zero: no space is taken"
        case .zeroAllocated: "zero: space is taken, its bytes are not shown"
        case .unallocated where goesOn: "not in this file: the backing file is asked"
        case .unallocated: "zero: nothing is stored, and there is no backing file"
        case .pastTheEnd: "zero: the disk ends before the byte"
        case .hole: "zero: a hole of the file"
        case .corrupt(let words): "cannot be read: \(words)"
        }
    }

    private static func count(_ refcount: UInt64?) -> String {
        refcount.map { "refcount \($0)" } ?? "its refcount cannot be read"
    }

    private static func hex(_ number: UInt64) -> String { "0x" + String(number, radix: 16) }

    /// All 16 digits of an entry.
    private static func digits(_ bits: UInt64) -> String {
        let digits = String(bits, radix: 16)
        return "0x" + String(repeating: "0", count: 16 - digits.count) + digits
    }
}

extension ExplainReport {
    // MARK: For programs

    static func json(_ explanation: Explanation) -> JSON {
        .members([
            "offset": .number(explanation.offset),
            "layers": .array(
                explanation.layers.enumerated().map { json($1, depth: $0) }),
            "obstacle": explanation.obstacle.map(JSON.string),
        ])
    }

    private static func json(_ layer: Explanation.Layer, depth: Int) -> JSON {
        var reason: String?
        if case .corrupt(let words) = layer.answer { reason = words }
        return .members([
            "depth": .number(UInt64(depth)),
            "filename": .string(layer.path),
            "format": .string(layer.format.rawValue),
            "virtual-size": .number(layer.virtualByteCount),
            "cluster-size": layer.clusterByteCount.map(JSON.number),
            "l1": layer.l1.map { json($0, target: "l2-offset") },
            "l2": layer.l2.map { json($0, target: "host-offset") },
            "subcluster": layer.subcluster.map(json),
            "answer": .string(layer.answer.word),
            "reason": reason.map(JSON.string),
            "place": layer.place.map { place in
                .members(["filename": .string(place.path), "offset": .number(place.offset)])
            },
            "compressed": layer.stream.map(json),
            "clusters": .array(
                layer.clusters.map { cluster in
                    .members([
                        "offset": .number(cluster.offset),
                        "refcount": cluster.refcount.map(JSON.number),
                    ])
                }),
            "snapshots": .array(layer.sharers.map(json)),
            "encryption": layer.encryption.map { encryption in
                .members([
                    "format": .string(encryption.method.rawValue),
                    "sector": .number(encryption.sector),
                    "sector-of": .string(encryption.method == .luks ? "file" : "disk"),
                ])
            },
        ])
    }

    private static func json(_ entry: Explanation.TableEntry, target: String) -> JSON {
        .object(
            [
                ("index", .number(entry.index)),
                ("entry-offset", .number(entry.place)),
                ("entry", .string(digits(entry.bits))),
                (target, .number(entry.target)),
                ("copied", .boolean(entry.isCopied)),
                ("compressed", .boolean(entry.isCompressed)),
                ("zero", .boolean(entry.hasZeroFlag)),
                ("reserved-bits", .string(hex(entry.reservedBits))),
            ] + (entry.refcount.map { [("refcount", .number($0))] } ?? []))
    }

    private static func json(_ part: Explanation.Subcluster) -> JSON {
        .members([
            "index": .number(UInt64(part.index)),
            "allocated": .number(UInt64(part.allocated)),
            "zero": .number(UInt64(part.zero)),
        ])
    }

    private static func json(_ stream: Explanation.Stream) -> JSON {
        .members([
            "type": .string(stream.type == .zstd ? "zstd" : "zlib"),
            "offset": .number(stream.offset),
            "length": .number(UInt64(stream.byteCount)),
            "position": .number(stream.position),
        ])
    }

    private static func json(_ sharer: Explanation.Sharer) -> JSON {
        .members([
            "id": .string(sharer.id),
            "name": .string(sharer.name),
            "l2-table": .boolean(sharer.sharesTable),
            "cluster": .boolean(sharer.sharesCluster),
        ])
    }
}

extension Explanation.Answer {
    fileprivate var word: String {
        switch self {
        case .data: "data"
        case .compressed: "compressed"
        case .zeroPlain: "zero"
        case .zeroAllocated: "zero-allocated"
        case .unallocated: "unallocated"
        case .pastTheEnd: "past-the-end"
        case .hole: "hole"
        case .corrupt: "corrupt"
        }
    }
}

extension Explanation.TableEntry {
    fileprivate var noun: String { target == 0 && !isCopied ? "no cluster" : "cluster" }
}

extension Explanation.Subcluster {
    fileprivate var word: String {
        let bit = UInt32(1) << UInt32(index & 31)
        return switch (allocated & bit != 0, zero & bit != 0) {
        case (true, true): "allocated and zero at once"
        case (true, false): "allocated"
        case (false, true): "zero"
        case (false, false): "not allocated"
        }
    }
}
