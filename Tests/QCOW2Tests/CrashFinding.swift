import TestSupport

/// What the tests' own reader sees in an image that a power cut left, sector by sector; nil stands
/// for foreign or torn bytes.
struct CrashFinding {
    private(set) var disk: [UInt64?] = []
    private(set) var snapshots: [String: [UInt64?]] = [:]
    /// The data file, where that alone shall show the disk too.
    private(set) var rawData: [UInt64?]?
    let bitmaps: [ReferenceReader.Bitmap]
    let leakCount: Int

    /// - Throws: What is wrong with the image whatever it may hold.
    init(
        in state: UnsafeRawBufferPointer, _ layout: CrashLayout
    ) throws(ReferenceReader.Fault) {
        let files = layout.files(of: state)
        let reader = try ReferenceReader(
            files.image, dataFile: files.data,
            cipher: layout.isEncrypted ? layout.encryptedDisk.cipher : nil)
        let audit = reader.audit()
        if let fault = audit.faults.first { throw .init(fault) }
        leakCount = audit.leakCount
        bitmaps = try reader.bitmaps()
        disk = try Self.values(reader, reader.active, reader.byteCount, layout)
        for snapshot in try reader.snapshots().entries {
            snapshots[snapshot.name] = try Self.values(
                reader, snapshot.table, snapshot.byteCount ?? reader.byteCount, layout)
        }
        guard layout.isRaw, let data = files.data else { return }
        rawData = disk.indices.map { Self.value(of: $0, in: data) }
    }

    private static func values(
        _ reader: ReferenceReader, _ table: ReferenceReader.L1Table, _ byteCount: Int,
        _ layout: CrashLayout
    ) throws(ReferenceReader.Fault) -> [UInt64?] {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 4096)
        defer { buffer.deallocate() }
        try reader.read(into: buffer, at: 0, through: table, backing: layout.backingReader)
        return (0..<byteCount / 512).map { value(of: $0, in: UnsafeRawBufferPointer(buffer)) }
    }

    static func value(of sector: Int, in bytes: UnsafeRawBufferPointer) -> UInt64? {
        SectorPattern.value(
            of: UnsafeRawBufferPointer(rebasing: bytes[sector * 512..<(sector + 1) * 512]),
            sector: sector)
    }
}

extension CrashLayout {
    /// Reads the backing file; nil where there is none.
    var backingReader: ReferenceReader.Backing? {
        guard hasBacking else { return nil }
        let byteCount = byteCount
        return { (offset, part) throws(ReferenceReader.Fault) in
            for position in stride(from: 0, to: part.count, by: 512) {
                SectorPattern.fill(
                    UnsafeMutableRawBufferPointer(rebasing: part[position..<position + 512]),
                    sector: (offset + position) / 512,
                    value: offset + position < byteCount ? Self.backed : 0)
            }
        }
    }
}
