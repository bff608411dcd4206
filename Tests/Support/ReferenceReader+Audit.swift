/// Who refers to which host cluster, and whether the counts cover it.
extension ReferenceReader {
    /// What a walk over the whole image found.
    package struct Audit {
        /// References to each host cluster.
        package fileprivate(set) var references: [UInt64]
        /// Breaches of the invariants, the first ones only.
        package fileprivate(set) var faults: [String] = []
        /// Clusters whose count is above their references.
        package fileprivate(set) var leakCount = 0
        fileprivate var copied: [(cluster: Int, what: String)] = []

        fileprivate mutating func fault(_ words: @autoclosure () -> String) {
            if faults.count < 20 { faults.append(words()) }
        }
    }

    /// Walks everything that can be reached, and compares.
    ///
    /// I1: a count is never below the references.  I2: COPIED in an active table means exactly one
    /// reference.  I3: every structure parses, is aligned and lies inside the file.
    package func audit() -> Audit {
        var audit = Audit(references: Array(repeating: 0, count: fileClusterCount + 1))
        refer(to: 0..<1, "the header", &audit)
        walkRefcounts(&audit)
        walk(active, "active", &audit)
        walkSnapshots(&audit)
        walkBitmaps(&audit)
        walkKeys(&audit)
        compare(&audit)
        return audit
    }

    private func refer(
        to range: Range<Int>, _ what: @autoclosure () -> String, _ audit: inout Audit
    ) {
        guard !range.isEmpty else { return }
        guard range.lowerBound < bytes.count, range.upperBound <= bytes.count + clusterSize else {
            return audit.fault("I3: \(what()) at \(hex(range.lowerBound)) lies past the file's end")
        }
        for cluster in range.lowerBound >> clusterBits...(range.upperBound - 1) >> clusterBits
        where cluster < audit.references.count {
            audit.references[cluster] += 1
        }
    }

    private func isAligned(
        _ offset: Int, _ what: @autoclosure () -> String, _ audit: inout Audit
    ) -> Bool {
        if offset & (clusterSize - 1) == 0 { return true }
        audit.fault("I3: \(what()) at \(hex(offset)) is not aligned to \(clusterSize)")
        return false
    }

    private func walkRefcounts(_ audit: inout Audit) {
        let byteCount = refcountTableClusters * clusterSize
        guard isAligned(refcountTableOffset, "the refcount table", &audit) else { return }
        refer(
            to: refcountTableOffset..<refcountTableOffset + byteCount, "the refcount table", &audit)
        for index in 0..<byteCount / 8 {
            let raw = number(refcountTableOffset + index * 8)
            if raw == 0 { continue }
            guard raw & 0x1ff == 0, let block = Int(exactly: raw),
                isAligned(block, "refcount block \(index)", &audit)
            else {
                audit.fault("I3: refcount table entry \(index) is \(hex(raw))")
                continue
            }
            refer(to: block..<block + clusterSize, "refcount block \(index)", &audit)
        }
    }

    private func walk(_ table: L1Table, _ name: String, _ audit: inout Audit) {
        guard isAligned(table.offset, "the \(name) L1 table", &audit) else { return }
        refer(
            to: table.offset..<table.offset + table.entryCount * 8, "the \(name) L1 table", &audit)
        for index in 0..<table.entryCount {
            let raw = number(table.offset + index * 8)
            if raw & ~Self.copied == 0 { continue }
            let offset = Int(raw & Self.offsetMask)
            guard raw & 0x7f00_0000_0000_01ff == 0, isAligned(offset, "an L2 table", &audit) else {
                audit.fault("I3: \(name) L1 entry \(index) is \(hex(raw))")
                continue
            }
            refer(to: offset..<offset + clusterSize, "\(name) L2 table \(index)", &audit)
            if table.isActive, raw & Self.copied != 0 {
                audit.copied.append((offset >> clusterBits, "L1 entry \(index)"))
            }
            walkL2(offset, first: index * entriesPerL2Table, in: table, name, &audit)
        }
    }

    private func walkL2(
        _ offset: Int, first: Int, in table: L1Table, _ name: String, _ audit: inout Audit
    ) {
        guard offset < bytes.count else { return }
        for index in 0..<entriesPerL2Table {
            let raw = number(offset + index * entrySize)
            let bitmap = isExtended ? number(offset + index * entrySize + 8) : 0
            if bitmap == 0, raw == 0 || raw == 1 && version == 3 { continue }
            do throws(Fault) {
                // What the bitmap says is for the reader: a host cluster counts whatever it shows.
                if isExtended { _ = try entry(raw, bitmap, subcluster: 0) }
                let isStream = raw >> 62 & 1 == 1
                switch try entry(
                    isExtended && !isStream ? raw & ~1 : raw, ofGuestCluster: first + index)
                {
                case .unallocated, .zeroPlain: continue
                case .normal where dataFile != nil, .zeroAllocated where dataFile != nil:
                    // Nothing counts a data file's clusters, so each is its entry's alone.
                    if raw & Self.copied == 0 {
                        audit.fault("I2: guest cluster \(first + index) is not COPIED")
                    }
                case .normal(let host), .zeroAllocated(let host):
                    refer(
                        to: host..<host + clusterSize, "\(name) guest cluster \(first + index)",
                        &audit)
                    if table.isActive, raw & Self.copied != 0 {
                        audit.copied.append((host >> clusterBits, "guest cluster \(first + index)"))
                    }
                case .compressed(let host, let byteCount):
                    // Whole sectors count; those past the end of the file belong to nobody.
                    let end = Swift.min(host + byteCount, (bytes.count + 511) / 512 * 512)
                    guard host < end else {
                        audit.fault("I3: the stream at \(hex(host)) lies past the file's end")
                        continue
                    }
                    refer(to: host & ~511..<host + byteCount, "a stream", &audit)
                }
            } catch {
                audit.fault("I3: \(name) guest cluster \(first + index): \(error)")
            }
        }
    }

    private func walkSnapshots(_ audit: inout Audit) {
        do throws(Fault) {
            let (entries, byteCount) = try snapshots()
            guard !entries.isEmpty, isAligned(snapshotsOffset, "the snapshot table", &audit) else {
                return
            }
            refer(to: snapshotsOffset..<snapshotsOffset + byteCount, "the snapshot table", &audit)
            for snapshot in entries { walk(snapshot.table, "snapshot \(snapshot.id)", &audit) }
        } catch { audit.fault("I3: \(error)") }
    }

    private func walkBitmaps(_ audit: inout Audit) {
        guard autoclearFeatures & 1 == 1, let list = try? extensions(),
            let bitmaps = list.first(where: { $0.type == 0x2385_2875 }), bitmaps.data.count == 24
        else { return }
        let byteCount = Int(truncatingIfNeeded: bitmaps.data.number(at: 8, as: UInt64.self))
        let directory = Int(truncatingIfNeeded: bitmaps.data.number(at: 16, as: UInt64.self))
        refer(to: directory..<directory + byteCount, "the bitmap directory", &audit)
        var position = directory
        for _ in 0..<bitmaps.data.number(at: 0, as: UInt32.self) {
            let table = Int(truncatingIfNeeded: number(position))
            let entryCount = Int(bytes.number(at: position + 8, as: UInt32.self))
            refer(to: table..<table + entryCount * 8, "a bitmap table", &audit)
            for index in 0..<Swift.min(entryCount, 1 << 20) {
                let data = Int(number(table + index * 8) & Self.offsetMask)
                if data != 0 { refer(to: data..<data + clusterSize, "bitmap data", &audit) }
            }
            let nameLength = Int(bytes.number(at: position + 18, as: UInt16.self))
            let extraLength = Int(bytes.number(at: position + 20, as: UInt32.self))
            position += (24 + extraLength + nameLength + 7) / 8 * 8
        }
    }

    private func walkKeys(_ audit: inout Audit) {
        guard let area = try? encryptionArea(),
            isAligned(area.lowerBound, "the LUKS header", &audit)
        else { return }
        refer(to: area, "the LUKS header", &audit)
    }

    /// Where the header of LUKS lies, with its key slots; nil where there is none.
    package func encryptionArea() throws(Fault) -> Range<Int>? {
        guard let keys = try extensions().first(where: { $0.type == 0x0537_be77 }),
            keys.data.count == 16
        else { return nil }
        let offset = Int(truncatingIfNeeded: keys.data.number(at: 0, as: UInt64.self))
        let byteCount = Int(truncatingIfNeeded: keys.data.number(at: 8, as: UInt64.self))
        return offset..<offset + byteCount
    }

    /// Whether no counter of the block at `block` from `position` on counts anything.
    private func isZero(_ block: Int, from position: Int) -> Bool {
        let start = block + position * refcountBits / 8
        guard block != 0, start < block + clusterSize, block + clusterSize <= bytes.count else {
            return false
        }
        let rest = UnsafeRawBufferPointer(rebasing: bytes[start..<block + clusterSize])
        return rest[0] == 0 && rest.isZero
    }

    private func compare(_ audit: inout Audit) {
        let perBlock = clusterSize * 8 / refcountBits
        for index in 0..<refcountTableClusters * entriesPerTable {
            let first = index * perBlock
            let block = Int(truncatingIfNeeded: number(refcountTableOffset + index * 8) & ~0x1ff)
            if block == 0 && first >= audit.references.count { continue }
            for position in 0..<perBlock {
                let cluster = first + position
                // Most of a block counts nothing.
                if cluster == audit.references.count, isZero(block, from: position) { break }
                let needed = cluster < audit.references.count ? audit.references[cluster] : 0
                let count = block == 0 ? 0 : counter(position, in: block)
                if count > needed { audit.leakCount += 1 }
                if count < needed {
                    audit.fault("I1: host cluster \(cluster): count \(count), \(needed) references")
                }
                if block == 0 && cluster >= audit.references.count { break }
            }
        }
        let covered = refcountTableClusters * entriesPerTable * perBlock
        if let cluster = audit.references.indices.first(
            where: { $0 >= covered && audit.references[$0] > 0 })
        {
            audit.fault("I1: host cluster \(cluster) lies past what the refcount table covers")
        }
        let references = audit.references
        for (cluster, what) in audit.copied
        where cluster < references.count && references[cluster] != 1 {
            audit.fault(
                "I2: \(what) is COPIED, host cluster \(cluster) has "
                    + "\(references[cluster]) references")
        }
    }
}
