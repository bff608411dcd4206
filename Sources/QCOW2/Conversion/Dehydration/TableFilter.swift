/// Keeps what can be an entry of a table, and nothing else: where damaged pointers lead to bytes
/// that may be a guest's, these do not pass.
struct TableFilter {
    enum Kind: Sendable {
        case l1, l2, refcountTable, refcountBlock, bitmapTable, bitmapData
    }

    /// Bytes at which no cluster can begin any more.
    let end: UInt64
    let clusterBits: UInt32
    let isExtended: Bool
    let refcounts: RefcountFormat

    /// The largest count of a doubtful block that passes: guests' bytes are seldom as small.
    private static let largestCount: UInt64 = 15

    /// Whether such a table's bytes tell it from a guest's.
    func tells(_ kind: Kind) -> Bool {
        switch kind {
        case .bitmapData: false
        case .refcountBlock: refcounts.order >= 3
        default: true
        }
    }

    /// How many entries that are not zero passed, and how many did not.
    struct Passage: Sendable {
        var kept: UInt64 = 0
        var dropped: UInt64 = 0

        /// Whether the entries are those of a table, of which some may be damaged.
        var isTable: Bool { dropped <= kept }

        mutating func add(_ other: Passage) {
            kept += other.kept
            dropped += other.dropped
        }
    }

    /// Zeroes what can be no entry in `bytes`, which begin with one.
    func apply(_ kind: Kind, to bytes: UnsafeMutableRawBufferPointer) -> Passage {
        // The file may end within an entry.
        let whole = bytes.count & ~(kind == .l2 && isExtended ? 15 : 7)
        UnsafeMutableRawBufferPointer(rebasing: bytes[whole...])
            .initializeMemory(as: UInt8.self, repeating: 0)
        return switch kind {
        case .l1: words(bytes) { isPointer($0, flags: L1Entry.copied) }
        case .refcountTable: words(bytes) { isPointer($0, flags: 0) }
        case .bitmapTable: words(bytes) { $0 == 1 || isPointer($0, flags: 0) }
        case .l2 where isExtended: extendedEntries(bytes)
        case .l2: words(bytes) { isCluster($0) }
        case .refcountBlock: counts(bytes)
        case .bitmapData: words(bytes) { _ in false }
        }
    }

    private func words(
        _ bytes: UnsafeMutableRawBufferPointer, _ isKept: (UInt64) -> Bool
    ) -> Passage {
        var passage = Passage()
        for offset in stride(from: 0, to: bytes.count & ~7, by: 8) {
            let word = UnsafeRawBufferPointer(bytes).bigEndian(at: offset, as: UInt64.self) ?? 0
            guard word != 0 else { continue }
            if isKept(word) {
                passage.kept += 1
            } else {
                bytes.storeBigEndian(UInt64(0), at: offset)
                passage.dropped += 1
            }
        }
        return passage
    }

    private func isPointer(_ word: UInt64, flags: UInt64) -> Bool {
        let offset = word & ~flags
        return offset & (1 << UInt64(clusterBits) - 1) == 0 && offset < end
    }

    private func isCluster(_ word: UInt64) -> Bool {
        let entry = L2Entry(bits: word)
        guard entry.isCompressed else {
            return isPointer(word, flags: L2Entry.copied | (isExtended ? 0 : L2Entry.zero))
        }
        return !entry.isCopied
            && CompressedDescriptor(entry, clusterBits: clusterBits).offset < end
    }

    private func extendedEntries(_ bytes: UnsafeMutableRawBufferPointer) -> Passage {
        var passage = Passage()
        for offset in stride(from: 0, to: bytes.count & ~15, by: 16) {
            let raw = UnsafeRawBufferPointer(bytes)
            let word = raw.bigEndian(at: offset, as: UInt64.self) ?? 0
            let bitmap = SubclusterBitmap(bits: raw.bigEndian(at: offset + 8) ?? 0)
            guard word != 0 || bitmap != .none else { continue }
            let isKept =
                isCluster(word) && !bitmap.clashes && (word != 0 || bitmap.allocated == 0)
            if isKept {
                passage.kept += 1
                continue
            }
            bytes.storeBigEndian(UInt64(0), at: offset)
            bytes.storeBigEndian(UInt64(0), at: offset + 8)
            passage.dropped += 1
        }
        return passage
    }

    /// Counts below a byte's width can be any bytes: none of them passes.
    private func counts(_ bytes: UnsafeMutableRawBufferPointer) -> Passage {
        guard refcounts.order >= 3 else { return words(bytes) { _ in false } }
        var passage = Passage()
        for index in 0..<refcounts.entryCount(inBytes: bytes.count) {
            let count = refcounts.count(at: index, in: UnsafeRawBufferPointer(bytes))
            if count > Self.largestCount {
                refcounts.store(0, at: index, in: bytes)
                passage.dropped += 1
            } else if count > 0 {
                passage.kept += 1
            }
        }
        return passage
    }
}
