/// Makes tables lead to where clusters have gone.
struct TableSwitch {
    private let file: HostFile
    private let survey: CompactionSurvey
    private let relocation: Relocation

    init(_ file: HostFile, _ survey: CompactionSurvey, _ relocation: Relocation) {
        self.file = file
        self.survey = survey
        self.relocation = relocation
    }

    /// Completes the copies of tables, to which nothing leads yet.
    func writeMoved() throws(ImageError) { try rewrite(moved: true) }

    /// Changes the entries of tables that stay, and the header's.  An entry is one word within a
    /// sector: it leads to the old place or to the new one.
    func switchOthers() throws(ImageError) {
        try rewrite(moved: false)
        try switchHeader()
    }

    /// Takes refcount blocks out of the table.
    func clearBlocks(_ entries: Range<UInt64>) throws(ImageError) {
        let table = relocation.place(ofOffset: survey.header.refcountTableOffset)
        try file.writeZeroes(
            table &+ entries.lowerBound &* 8..<table &+ entries.upperBound &* 8)
    }

    // MARK: Tables

    private func rewrite(moved: Bool) throws(ImageError) {
        var buffer: [UInt8] = []
        for table in survey.tables where isMoved(table.offset) == moved {
            try rewrite(table.offset, table.byteCount, &buffer) { bytes in
                change(table.kind, &bytes)
            }
        }
        // Host offsets of a data file are the guest's.
        guard !survey.header.hasDataFile else { return }
        for table in survey.l2Tables.keys.sorted()
        where isMoved(table) == moved && !survey.emptyTables.contains(table) {
            try rewrite(table, survey.header.clusterByteCount, &buffer) { bytes in
                changeL2(&bytes)
            }
        }
    }

    private func isMoved(_ offset: UInt64) -> Bool { relocation.place(ofOffset: offset) != offset }

    /// Writes the part of a table that `change` has changed, where the table is now.
    private func rewrite(
        _ offset: UInt64, _ byteCount: UInt64, _ buffer: inout [UInt8],
        _ change: (inout Entries) -> Void
    ) throws(ImageError) {
        if buffer.count != Int(byteCount) { buffer = [UInt8](repeating: 0, count: Int(byteCount)) }
        let place = relocation.place(ofOffset: offset)
        try buffer.withMutableRawBytes { bytes throws(ImageError) in
            try file.read(into: bytes, at: offset)
            var entries = Entries(bytes)
            change(&entries)
            guard let changed = entries.changed else { return }
            try file.write(
                UnsafeRawBufferPointer(rebasing: bytes[changed]),
                at: place &+ UInt64(changed.lowerBound))
        }
    }

    /// The words of a table, and which of them were changed.
    struct Entries {
        let bytes: UnsafeMutableRawBufferPointer
        private(set) var changed: Range<Int>?

        init(_ bytes: UnsafeMutableRawBufferPointer) { self.bytes = bytes }

        func word(at offset: Int) -> UInt64 {
            UnsafeRawBufferPointer(bytes).bigEndian(at: offset, as: UInt64.self) ?? 0
        }

        mutating func replace(_ old: UInt64, by new: UInt64, at offset: Int) {
            guard new != old else { return }
            bytes.storeBigEndian(new, at: offset)
            changed =
                min(
                    changed?.lowerBound ?? offset, offset)..<max(
                    changed?.upperBound ?? 0, offset + 8)
        }
    }

    private func change(_ kind: CompactionSurvey.Table.Kind, _ entries: inout Entries) {
        switch kind {
        case .l1: changeWords(&entries) { relocation.entry(L1Entry(bits: $0)).bits }
        case .bitmap: changeWords(&entries) { relocation.entry(BitmapTableEntry(bits: $0)).bits }
        case .refcounts:
            changeWords(&entries) { relocation.entry(RefcountTableEntry(bits: $0)).bits }
        case .snapshots:
            var offset = 0
            for snapshot in survey.snapshots {
                changeOffset(at: offset, &entries)
                offset += snapshot.byteCount
            }
        case .bitmapDirectory:
            for bitmap in survey.bitmaps { changeOffset(at: bitmap.directoryOffset, &entries) }
        }
    }

    private func changeWords(_ entries: inout Entries, _ change: (UInt64) -> UInt64) {
        for offset in stride(from: 0, to: entries.bytes.count & ~7, by: 8) {
            let word = entries.word(at: offset)
            if word != 0 { entries.replace(word, by: change(word), at: offset) }
        }
    }

    private func changeOffset(at offset: Int, _ entries: inout Entries) {
        let old = entries.word(at: offset)
        entries.replace(old, by: relocation.place(ofOffset: old), at: offset)
    }

    private func changeL2(_ entries: inout Entries) {
        let step = Int(survey.header.l2EntryByteCount)
        for offset in stride(from: 0, to: entries.bytes.count, by: step) {
            let word = entries.word(at: offset)
            if word != 0 {
                entries.replace(word, by: relocation.entry(L2Entry(bits: word)), at: offset)
            }
        }
    }

    // MARK: The header

    private func switchHeader() throws(ImageError) {
        let sector = try HeaderSector(of: file)
        for field in [
            HeaderField.l1Offset, HeaderField.refcountTableOffset, HeaderField.snapshotsOffset,
        ] {
            let old = sector.number(at: field)
            let new = relocation.place(ofOffset: old)
            if new != old { sector.change { $0.storeBigEndian(new, at: field) } }
        }
        try switchDirectory(sector)
        if let bytes = sector.freeze() { try file.write(bytes, at: 0) }
    }

    /// The directory's bytes are the same at its new place, so that one word says all.
    private func switchDirectory(_ sector: HeaderSector) throws(ImageError) {
        guard let directory = survey.header.bitmaps, !survey.bitmaps.isEmpty else { return }
        let new = relocation.place(ofOffset: directory.directoryOffset)
        guard new != directory.directoryOffset else { return }
        let cluster = try Header.read(
            Int(survey.header.clusterByteCount), at: 0, of: file.device)
        let record = cluster.withRawBytes { bytes in
            ExtensionArea(bytes, survey.header).record(of: HeaderExtension.bitmaps)
        }
        guard let record else { return }
        let field = record.dataOffset + BitmapsExtension.directoryOffsetField
        if field < HeaderSector.byteCount {
            return sector.change { $0.storeBigEndian(new, at: field) }
        }
        var word = [UInt8](repeating: 0, count: 8)
        word.storeBigEndian(new, at: 0)
        try file.write(word, at: UInt64(field))
    }
}
