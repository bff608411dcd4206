/// Replaces a header, with the extensions and the name behind it, so that whatever a power cut
/// leaves is the old one or the new one.
///
/// One write of the first sector is the switch.  Where more than that sector changes, the new rest
/// is written to a free place of the first cluster, and an extension of no meaning leads there
/// while the usual place is being written.
struct HeaderRewrite {
    private let file: HostFile
    private let old: [UInt8]

    /// A type that nobody knows, and so everybody skips.
    private static let detour: UInt32 = 0x6465_746f
    private static let sector = HeaderSector.byteCount

    init(of file: HostFile) throws(ImageError) {
        self.file = file
        let start = try Header.read(from: file.device)
        old = try Header.read(Int(start.clusterByteCount), at: 0, of: file.device)
    }

    func replace(by header: Header) throws(ImageError) {
        let new: [UInt8]
        do throws(FormatError) {
            new = try header.encoded()
        } catch {
            throw ImageError(.malformed(error), file: file.name)
        }
        let rest = new.dropFirst(Self.sector)
        if rest.elementsEqual(old.dropFirst(Self.sector).prefix(rest.count)) {
            try writeSector(new)
        } else if oldEnd <= Self.sector {
            try writeRest(of: new)
            try writeSector(new)
        } else {
            try takeDetour(new, areaStart: Int(header.encodedByteCount))
            try writeRest(of: new)
            try writeSector(new)
        }
        try eraseLeftovers(behind: new.count)
    }

    /// The end of whatever was in the first cluster.
    private var oldEnd: Int { (old.lastIndex { $0 != 0 } ?? -1) + 1 }

    private func takeDetour(_ new: [UInt8], areaStart: Int) throws(ImageError) {
        let area = Array(new[areaStart...])
        let place = (max(oldEnd, new.count) + Self.sector - 1) / Self.sector * Self.sector
        guard areaStart + 8 <= Self.sector, place + area.count <= old.count else {
            throw ImageError(
                .invalidArgument("the first cluster has no room to change the header safely"),
                file: file.name)
        }
        try file.write(area, at: UInt64(place))
        try file.flush()
        var sector = Array(new[..<areaStart]) + [UInt8](repeating: 0, count: 8)
        sector.storeBigEndian(Self.detour, at: areaStart)
        sector.storeBigEndian(UInt32(place - areaStart - 8), at: areaStart + 4)
        let name = sector.withRawBytes { $0.bigEndian(at: 8, as: UInt64.self) } ?? 0
        if name != 0 { sector.storeBigEndian(name + UInt64(place - areaStart), at: 8) }
        try writeSector(sector)
    }

    private func writeRest(of new: [UInt8]) throws(ImageError) {
        try file.write(Array(new[Self.sector...]), at: UInt64(Self.sector))
        try file.flush()
    }

    private func writeSector(_ new: [UInt8]) throws(ImageError) {
        let sector = new.prefix(Self.sector)
        try file.write(
            sector + [UInt8](repeating: 0, count: Self.sector - sector.count), at: 0)
        try file.flush()
    }

    /// What nothing refers to any more goes.
    private func eraseLeftovers(behind end: Int) throws(ImageError) {
        let end = max(end, Self.sector)
        // The detour, if one was taken, ends with the cluster at the latest.
        guard old.count > end else { return }
        try file.writeZeroes(UInt64(end)..<UInt64(old.count))
        try file.flush()
    }
}
