/// What the guest sees.
extension ReferenceReader {
    /// Fills a buffer with the guest bytes of the backing file from an offset on.
    package typealias Backing = (Int, UnsafeMutableRawBufferPointer) throws(Fault) -> Void

    /// Fills `buffer` with the guest bytes from `offset` on, as the L1 table `table` maps them.
    package func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: Int, through table: L1Table? = nil,
        backing: Backing? = nil
    ) throws(Fault) {
        let table = table ?? active
        let unit = isExtended ? clusterSize / 32 : clusterSize
        var done = 0
        while done < buffer.count {
            let position = offset + done
            let within = position % clusterSize
            let count = min(unit - within % unit, buffer.count - done)
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + count])
            switch try entry(at: position, in: table) {
            case .unallocated:
                if let backing { try backing(position, part) } else { part.fillZero() }
            case .zeroPlain, .zeroAllocated: part.fillZero()
            case .normal(let host):
                copy(from: host + within, into: part)
                try decrypt(part, from: host + within)
            case .compressed(let host, let byteCount):
                try inflate(host, byteCount, from: within, into: part)
            }
            done += count
        }
    }

    /// The guest bytes of `range`.
    package func read(
        _ range: Range<Int>, through table: L1Table? = nil, backing: Backing? = nil
    ) throws(Fault) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: range.count)
        var fault: Fault?
        bytes.withUnsafeMutableBytes { buffer in
            do throws(Fault) {
                try read(into: buffer, at: range.lowerBound, through: table, backing: backing)
            } catch { fault = error }
        }
        if let fault { throw fault }
        return bytes
    }

    /// What the entry of guest offset `position` says of it.
    private func entry(at position: Int, in table: L1Table) throws(Fault) -> Entry {
        let cluster = position / clusterSize
        let raw = try rawEntry(forGuestCluster: cluster, in: table)
        guard isExtended else { return try entry(raw, ofGuestCluster: cluster) }
        let found = try entry(
            raw, bitmap(forGuestCluster: cluster, in: table),
            subcluster: position % clusterSize / (clusterSize / 32))
        return try checked(found, ofGuestCluster: cluster)
    }

    /// What the entry of a guest cluster says: in a data file each has its own place.
    package func entry(_ raw: UInt64, ofGuestCluster cluster: Int) throws(Fault) -> Entry {
        try checked(try entry(raw), ofGuestCluster: cluster)
    }

    private func checked(_ entry: Entry, ofGuestCluster cluster: Int) throws(Fault) -> Entry {
        guard dataFile != nil else { return entry }
        switch entry {
        case .compressed: throw Fault("guest cluster \(cluster) is compressed, in a data file")
        case .normal(let host) where host != cluster * clusterSize,
            .zeroAllocated(let host) where host != cluster * clusterSize:
            throw Fault("guest cluster \(cluster) lies at \(hex(host)) of the data file")
        default: return entry
        }
    }

    /// The L2 entry of a guest cluster, an extended one's first word; 0 where there is no table.
    package func rawEntry(forGuestCluster cluster: Int, in table: L1Table) throws(Fault) -> UInt64 {
        let offset = try entryOffset(cluster, in: table)
        return offset == 0 ? 0 : number(offset)
    }

    /// An extended L2 entry's second word.
    package func bitmap(forGuestCluster cluster: Int, in table: L1Table) throws(Fault) -> UInt64 {
        let offset = try entryOffset(cluster, in: table)
        return offset == 0 ? 0 : number(offset + 8)
    }

    /// Where the entry of a guest cluster lies; 0 where there is no table.
    private func entryOffset(_ cluster: Int, in table: L1Table) throws(Fault) -> Int {
        let index = cluster / entriesPerL2Table
        guard index < table.entryCount else { return 0 }
        let pointer = number(table.offset + index * 8)
        guard pointer & 0x7f00_0000_0000_01ff == 0 else {
            throw Fault("L1 entry \(hex(pointer)) has reserved bits set")
        }
        let offset = Int(pointer & Self.offsetMask)
        guard offset % clusterSize == 0 else {
            throw Fault("L1 entry \(hex(pointer)) is not aligned to \(clusterSize)")
        }
        return offset == 0 ? 0 : offset + cluster % entriesPerL2Table * entrySize
    }

    private func copy(from host: Int, into part: UnsafeMutableRawBufferPointer) {
        let data = dataFile ?? bytes
        let there = Swift.max(0, Swift.min(part.count, data.count - host))
        if there > 0 {
            part.copyMemory(from: UnsafeRawBufferPointer(rebasing: data[host..<host + there]))
        }
        UnsafeMutableRawBufferPointer(rebasing: part[there...]).fillZero()
    }

    private func decrypt(
        _ part: UnsafeMutableRawBufferPointer, from host: Int
    ) throws(Fault) {
        guard isEncrypted else { return }
        guard let cipher, host % 512 == 0, part.count % 512 == 0 else {
            throw Fault("encrypted data is read by the sector, and with its key")
        }
        cipher.decrypt(part, firstSector: host / 512)
    }

    private func inflate(
        _ host: Int, _ byteCount: Int, from within: Int, into part: UnsafeMutableRawBufferPointer
    ) throws(Fault) {
        guard host < bytes.count else { throw Fault("a stream at \(host) lies past the end") }
        let end = Swift.min(host + byteCount, bytes.count)
        let source = UnsafeRawBufferPointer(rebasing: bytes[host..<end])
        let cluster = UnsafeMutableRawBufferPointer.allocate(byteCount: clusterSize, alignment: 16)
        defer { cluster.deallocate() }
        let isFine =
            compressionType == 0
            ? Streams.inflate(source, into: cluster) : Streams.unzstd(source, into: cluster)
        guard isFine else { throw Fault("the stream at \(host) does not inflate") }
        part.copyMemory(
            from: UnsafeRawBufferPointer(rebasing: cluster[within..<within + part.count]))
    }
}

extension UnsafeMutableRawBufferPointer {
    package func fillZero() {
        if let base = baseAddress {
            base.initializeMemory(as: UInt8.self, repeating: 0, count: count)
        }
    }
}
