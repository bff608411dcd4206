"""Mistakes that the crash tests must catch, as changes to the engine's sources.

Each is compiled into the test-only build beside the right code; `Mutant.isOn(NAME)` chooses one.
A text that is no longer in its file is an error: the mistake must follow the code.
"""

COMMIT = "Sources/QCOW2/Commit/Commit.swift"
CAPTURE = "Sources/QCOW2/Image+SnapshotCapture.swift"
DELETE = "Sources/QCOW2/Image+SnapshotDelete.swift"
TABLE = "Sources/QCOW2/Image+SnapshotTable.swift"

MISTAKES = {
    "a freed cluster is reused before the commit": [
        (
            COMMIT,
            "        do throws(ImageError) {\n            try prepare(&transaction)",
            "        if MUTANT { try? reclaim(transaction) }\n"
            "        do throws(ImageError) {\n            try prepare(&transaction)",
        ),
        (
            COMMIT,
            "            try reclaim(transaction)\n        } catch {",
            "            if !MUTANT { try reclaim(transaction) }\n        } catch {",
        ),
    ],
    "counts fall before the entries are gone": [
        (
            COMMIT,
            "        if allocator.takeUnsyncedIncrements() {",
            "        if MUTANT {\n"
            "            let dropped = transaction.map.dropped + transaction.refcounts.dropped\n"
            "            _ = try allocator.drop(dropped.sorted { $0.first < $1.first })\n"
            "        }\n"
            "        if allocator.takeUnsyncedIncrements() {",
        ),
        (
            COMMIT,
            "        guard !dropped.isEmpty else { return }",
            "        guard !dropped.isEmpty, !MUTANT else { return }",
        ),
    ],
    "the sync between counts and entries is left out": [
        (
            COMMIT,
            "        if transaction.needsFirstSync { try syncFile() }",
            "        if transaction.needsFirstSync, !MUTANT { try syncFile() }",
        ),
    ],
    "entries are written with the data, not after it": [
        (
            COMMIT,
            "        try syncData()\n        // Nothing new is shown",
            "        if MUTANT {\n"
            "            for piece in transaction.map.tables.pieces {\n"
            "                try file.write(piece.bytes, at: piece.offset)\n"
            "            }\n"
            "        }\n"
            "        try syncData()\n        // Nothing new is shown",
        ),
    ],
    "COPIED is set before the snapshot is gone": [
        (
            DELETE,
            "        try switchTable(to: rest, at: room, writing)",
            "        if MUTANT { try restoreCopied(writing) }\n"
            "        try switchTable(to: rest, at: room, writing)",
        ),
        (
            TABLE,
            "answers[target] = isAlone",
            "answers[target] = isAlone || MUTANT",
        ),
    ],
    "COPIED stays where a snapshot has the cluster too": [
        (
            CAPTURE,
            "return old.isCompressed ? old : old.withoutCopied",
            "return old.isCompressed || MUTANT ? old : old.withoutCopied",
        ),
    ],
}
