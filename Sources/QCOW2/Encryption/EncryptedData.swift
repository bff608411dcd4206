internal import Glibc

/// The guest data of one encrypted file: readable above, encrypted below.
///
/// A sector of 512 bytes is encrypted as a whole, so a write that covers one in part reads it
/// before; and no thread may see half of a sector that another one writes.  Both are what `locks`
/// are for, which are taken after all others and held during one transfer.
final class EncryptedData: Sendable {
    /// What makes a sector's initialization vector.
    enum Numbering: Sendable {
        /// The sector's place in the file (LUKS).
        case host
        /// The sector's place on the virtual disk (legacy AES).
        case guest
    }

    private static let sector = UInt64(SectorCipher.sectorByteCount)
    /// Bytes transferred at once: what stays in a processor's cache until it is decrypted.
    private static let pieceByteCount = 128 << 10

    private let cipher: SectorCipher
    private let numbering: Numbering
    private let locks = RangeLocks(clusterBits: 20)
    private let isWritable: Bool
    private let scratch = ContextPool(destroying: { $0.deallocate() })

    init(_ cipher: SectorCipher, _ numbering: Numbering, isWritable: Bool) {
        self.cipher = cipher
        self.numbering = numbering
        self.isWritable = isWritable
    }

    /// Wipes the keys; nothing may be read or written afterwards.
    func close() { cipher.close() }

    // MARK: Reading

    /// Fills `buffer` with the guest data that lies at host offset `host` of `file`.
    func read(
        into buffer: UnsafeMutableRawBufferPointer, at host: UInt64, guest: UInt64,
        of file: HostFile
    ) throws(ImageError) {
        var done = 0
        while done < buffer.count {
            let place = Place(host: host &+ UInt64(done), guest: guest &+ UInt64(done))
            let rest = buffer.count - done
            let lead = Int(place.host % Self.sector)
            let isWhole = lead == 0 && rest >= SectorCipher.sectorByteCount
            let count =
                isWhole
                ? min(rest & ~(SectorCipher.sectorByteCount - 1), Self.pieceByteCount)
                : min(SectorCipher.sectorByteCount - lead, rest)
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + count])
            if isWhole {
                try readSectors(into: part, at: place, of: file)
            } else {
                try readPart(into: part, at: place, lead: lead, of: file)
            }
            done += count
        }
    }

    /// Where a byte is.
    private struct Place {
        let host: UInt64
        let guest: UInt64

        func advanced(by count: Int) -> Place {
            Place(host: host &+ UInt64(count), guest: guest &+ UInt64(count))
        }

        /// The start of the sector.
        func moved(back count: Int) -> Place {
            Place(host: host &- UInt64(count), guest: guest &- UInt64(count))
        }
    }

    private func readSectors(
        into buffer: UnsafeMutableRawBufferPointer, at place: Place, of file: HostFile
    ) throws(ImageError) {
        do {
            let held = isWritable ? locks.lockShared(place.host, UInt64(buffer.count)) : nil
            defer { if let held { locks.unlock(held) } }
            try file.read(into: buffer, at: place.host)
        }
        try apply(
            .decrypt, from: UnsafeRawBufferPointer(buffer), to: buffer, at: place, of: file)
    }

    /// Reads a part of one sector, which begins `lead` bytes before it.
    private func readPart(
        into buffer: UnsafeMutableRawBufferPointer, at place: Place, lead: Int, of file: HostFile
    ) throws(ImageError) {
        try withScratch { scratch throws(ImageError) in
            let sector = UnsafeMutableRawBufferPointer(
                rebasing: scratch[..<SectorCipher.sectorByteCount])
            try readSectors(into: sector, at: place.moved(back: lead), of: file)
            buffer.copyMemory(
                from: UnsafeRawBufferPointer(rebasing: sector[lead..<lead + buffer.count]))
        }
    }

    // MARK: Writing

    /// Encrypts `bytes` and writes them to host offset `host` of `file`; only what is numbered by
    /// host sectors is ever written.
    func write(
        _ bytes: UnsafeRawBufferPointer, at host: UInt64, to file: HostFile
    ) throws(ImageError) {
        try withScratch { scratch throws(ImageError) in
            var done = 0
            while done < bytes.count {
                let place = Place(host: host &+ UInt64(done), guest: 0)
                let lead = Int(place.host % Self.sector)
                let count = min(bytes.count - done, Self.pieceByteCount - lead)
                let part = UnsafeRawBufferPointer(rebasing: bytes[done..<done + count])
                if lead == 0, count % SectorCipher.sectorByteCount == 0 {
                    try writeSectors(part, at: place, through: scratch, to: file)
                } else {
                    try writePart(part, at: place, lead: lead, through: scratch, to: file)
                }
                done += count
            }
        }
    }

    private func writeSectors(
        _ bytes: UnsafeRawBufferPointer, at place: Place,
        through scratch: UnsafeMutableRawBufferPointer, to file: HostFile
    ) throws(ImageError) {
        let encrypted = UnsafeMutableRawBufferPointer(rebasing: scratch[..<bytes.count])
        try apply(.encrypt, from: bytes, to: encrypted, at: place, of: file)
        let held = locks.lockExclusive(place.host, UInt64(bytes.count))
        defer { locks.unlock(held) }
        try file.write(UnsafeRawBufferPointer(encrypted), at: place.host)
    }

    /// Writes bytes that cover their first or last sector in part.
    private func writePart(
        _ bytes: UnsafeRawBufferPointer, at place: Place, lead: Int,
        through scratch: UnsafeMutableRawBufferPointer, to file: HostFile
    ) throws(ImageError) {
        let unit = SectorCipher.sectorByteCount
        let byteCount = (lead + bytes.count + unit - 1) & ~(unit - 1)
        let start = place.moved(back: lead)
        let sectors = UnsafeMutableRawBufferPointer(rebasing: scratch[..<byteCount])
        let held = locks.lockExclusive(start.host, UInt64(byteCount))
        defer { locks.unlock(held) }
        if lead > 0 { try readSector(into: sectors, at: start, 0, of: file) }
        let last = byteCount - unit
        if (lead + bytes.count) % unit != 0, lead == 0 || last > 0 {
            try readSector(into: sectors, at: start, last, of: file)
        }
        UnsafeMutableRawBufferPointer(rebasing: sectors[lead..<lead + bytes.count])
            .copyMemory(from: bytes)
        try apply(
            .encrypt, from: UnsafeRawBufferPointer(sectors), to: sectors, at: start, of: file)
        try file.write(UnsafeRawBufferPointer(sectors), at: start.host)
    }

    /// Reads the sector that begins `position` bytes behind `start`, under the caller's lock.
    private func readSector(
        into sectors: UnsafeMutableRawBufferPointer, at start: Place, _ position: Int,
        of file: HostFile
    ) throws(ImageError) {
        let sector = UnsafeMutableRawBufferPointer(
            rebasing: sectors[position..<position + SectorCipher.sectorByteCount])
        let place = start.advanced(by: position)
        try file.read(into: sector, at: place.host)
        try apply(.decrypt, from: UnsafeRawBufferPointer(sector), to: sector, at: place, of: file)
    }

    // MARK: What both need

    private func apply(
        _ direction: CipherDirection, from source: UnsafeRawBufferPointer,
        to target: UnsafeMutableRawBufferPointer, at place: Place, of file: HostFile
    ) throws(ImageError) {
        let offset = numbering == .host ? place.host : place.guest
        do throws(EncryptionError) {
            try cipher.apply(direction, from: source, to: target, sector: offset / Self.sector)
        } catch {
            throw ImageError(.encryption(error), file: file.name)
        }
    }

    /// Calls `body` with `pieceByteCount` bytes, which are reused.
    private func withScratch(
        _ body: (UnsafeMutableRawBufferPointer) throws(ImageError) -> Void
    ) throws(ImageError) {
        let address =
            scratch.take() ?? .allocate(byteCount: Self.pieceByteCount, alignment: 4096)
        defer { scratch.give(address) }
        try body(UnsafeMutableRawBufferPointer(start: address, count: Self.pieceByteCount))
    }
}
