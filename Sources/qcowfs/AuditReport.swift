internal import QCOW2

/// An audit in lasting names of fields.
enum AuditReport {
    static func json(_ audit: ImageAudit) -> JSON {
        let header = audit.header
        return .members([
            "filename": .string(audit.path),
            "format": .string("qcow2"),
            "verdict": .string(audit.isRefused ? "refused" : "allowed"),
            "refusals": .array(audit.refusals.map(JSON.string)),
            "warnings": .array(audit.warnings.map(JSON.string)),
            "version": .number(UInt64(header.version)),
            "virtual-size": .number(header.virtualByteCount),
            "file-size": .number(audit.fileByteCount),
            "actual-size": .number(audit.allocatedByteCount),
            "cluster-size": .number(header.clusterByteCount),
            "refcount-bits": .number(UInt64(header.refcountBits)),
            "compression-type": .string(header.compressionType == .zstd ? "zstd" : "zlib"),
            "references": .array(audit.references.map(json)),
            "features": .array(audit.features.map(json)),
            "header-extensions": .array(header.extensions.map(json)),
            "encryption": audit.encryption.map(json),
            "snapshots": .array(audit.snapshots.map(json)),
            "bitmaps": .array(audit.bitmaps.map { json($0, header.clusterByteCount) }),
            "tables": json(audit.tables),
            "contents": json(audit.contents),
        ])
    }

    private static func json(_ reference: ImageAudit.Reference) -> JSON {
        .members([
            "kind": .string(reference.role.rawValue),
            "name": .string(reference.name),
            "form": .string(reference.form.rawValue),
            "format": reference.format.map(JSON.string),
            "verdict": .string(reference.verdict.rawValue),
            "reason": reference.reason.map(JSON.string),
            "location": reference.location.map(JSON.string),
            "resolved-path": reference.resolvedPath.map(JSON.string),
        ])
    }

    private static func json(_ feature: ImageAudit.FeatureBit) -> JSON {
        .members([
            "kind": .string("\(feature.kind)"),
            "bit": .number(UInt64(feature.bit)),
            "name": feature.name.map(JSON.string),
            "known": .boolean(feature.isKnown),
        ])
    }

    private static func json(_ part: HeaderExtension) -> JSON {
        .members([
            "type": .string("0x" + String(part.type, radix: 16)),
            "name": part.typeName.map(JSON.string),
            "length": .number(UInt64(part.data.count)),
        ])
    }

    private static func json(_ encryption: ImageAudit.Encryption) -> JSON {
        let luks = encryption.luks
        return .members([
            "format": .string(luks == nil ? "aes" : "luks"),
            "cipher-alg": luks.map { .string($0.suite.cipher.rawValue) },
            "cipher-mode": luks.map { .string($0.suite.mode.rawValue) },
            "hash-alg": luks.map { .string($0.hash.rawValue) },
            "master-key-iters": luks.map { .number(UInt64($0.keyDigestIterations)) },
            "key-slots": .array(
                encryption.keySlots.map { slot in
                    .members([
                        "slot": .number(UInt64(slot.number)),
                        "iters": .number(UInt64(slot.iterations)),
                        "milliseconds": slot.seconds.map(milliseconds),
                    ])
                }),
            "milliseconds": encryption.seconds.map(milliseconds),
        ])
    }

    private static func milliseconds(_ seconds: Double) -> JSON {
        .number(UInt64(max(0, min(seconds * 1000, 1e15)).rounded(.up)))
    }

    private static func json(_ snapshot: Snapshot) -> JSON {
        .members([
            "id": .string(snapshot.id),
            "name": .string(snapshot.name),
            "virtual-size": snapshot.diskByteCount.map(JSON.number),
            "vm-state-size": .number(snapshot.vmStateByteCount),
            "l1-entries": .number(UInt64(snapshot.l1EntryCount)),
        ])
    }

    private static func json(_ bitmap: BitmapEntry, _ clusterByteCount: UInt64) -> JSON {
        .members([
            "name": .string(bitmap.name),
            "granularity": .number(1 << UInt64(bitmap.granularityBits)),
            "data-size": .number(UInt64(bitmap.tableEntryCount) * clusterByteCount),
            "in-use": .boolean(bitmap.isInUse),
        ])
    }

    private static func json(_ tables: ImageAudit.Tables) -> JSON {
        .members([
            "l1": .number(tables.l1),
            "refcount-table": .number(tables.refcountTable),
            "snapshot-table": .number(tables.snapshotTable),
            "snapshot-l1": .number(tables.snapshotL1),
            "bitmap-directory": .number(tables.bitmapDirectory),
            "bitmap-tables": .number(tables.bitmapTables),
            "bitmap-data": .number(tables.bitmapData),
            "luks": .number(tables.luks),
            "total": .number(tables.total),
        ])
    }

    private static func json(_ contents: ImageAudit.Contents) -> JSON {
        .members([
            "complete": .boolean(contents.isComplete),
            "l2-tables": .number(contents.l2TableCount),
            "data-clusters": .number(contents.dataClusterCount),
            "compressed-clusters": .number(contents.compressedClusterCount),
            "compressed-size": .number(contents.streamByteCount),
            "expanded-size": .number(contents.expandedByteCount),
        ])
    }
}

extension AuditReport {
    static func text(_ audit: ImageAudit) -> String {
        let header = audit.header
        var lines = [
            "image: \(audit.path)",
            "verdict: \(audit.isRefused ? "refused" : "allowed")",
        ]
        lines += audit.refusals.map { "    refused: \($0)" }
        lines += audit.warnings.map { "    note: \($0)" }
        lines += [
            "disk: \(ByteSize(byteCount: header.virtualByteCount)), version \(header.version), "
                + "clusters of \(ByteSize(byteCount: header.clusterByteCount)), "
                + "refcounts of \(header.refcountBits) bits",
            "file: \(ByteSize(byteCount: audit.fileByteCount)), "
                + "\(ByteSize(byteCount: audit.contents.expandedByteCount)) once expanded",
            "tables: \(ByteSize(byteCount: audit.tables.total))",
        ]
        lines += audit.references.map(line)
        lines += audit.features.map { feature in
            "\(feature.kind) feature: \(feature.name ?? "bit \(feature.bit)")"
                + (feature.isKnown ? "" : " (unknown)")
        }
        if let encryption = audit.encryption { lines.append(line(encryption)) }
        lines += audit.snapshots.map { "snapshot \($0.id): \($0.name)" }
        lines += audit.bitmaps.map { "bitmap: \($0.name)" }
        return lines.map(Failure.oneLine).joined(separator: "\n")
    }

    private static func line(_ reference: ImageAudit.Reference) -> String {
        let role = reference.role == .backingFile ? "backing file" : "data file"
        let format = reference.format.map { " (\($0))" } ?? ""
        let place = reference.resolvedPath ?? reference.location
        let end = place.map { $0 == reference.name ? "" : ", at \($0)" } ?? ""
        return "\(role): \(reference.name)\(format): \(reference.verdict.rawValue)\(end)"
    }

    private static func line(_ encryption: ImageAudit.Encryption) -> String {
        guard let luks = encryption.luks else { return "encryption: legacy AES" }
        let tenths = encryption.seconds.map { Int(min($0 * 10, 1e9).rounded(.up)) }
        let cost = tenths.map { ", \($0 / 10).\($0 % 10) s for a wrong passphrase" } ?? ""
        return "encryption: LUKS, \(luks.suite.cipher.rawValue), "
            + "\(encryption.keySlots.count) key slots\(cost)"
    }
}
