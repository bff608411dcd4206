/// The door to guest data at host offsets, in the image's own file or in an external data file,
/// encrypted or not: whatever reads or writes guest data of a layer goes through here.
extension Layer {
    /// Whether guest data lies in a file of its own, in which host offsets are guest offsets.
    @inline(__always)
    var hasDataFile: Bool { map.hasDataFile }

    /// Fills `buffer` with what lies from host offset `host` on, at guest offset `guest` of the
    /// disk; past the end of the file lie zeros.
    @inline(__always)
    borrowing func read(
        into buffer: UnsafeMutableRawBufferPointer, at host: UInt64, guest: UInt64
    ) throws(ImageError) {
        if isEncrypted {
            return try opened().read(into: buffer, at: host, guest: guest, of: data)
        }
        try data.read(into: buffer, at: host)
    }

    /// Writes guest data to host offset `host`.
    @inline(__always)
    borrowing func write(_ bytes: UnsafeRawBufferPointer, at host: UInt64) throws(ImageError) {
        if isEncrypted { return try opened().write(bytes, at: host, to: data) }
        try data.write(bytes, at: host)
    }

    /// What encrypts and decrypts the guest data of an encrypted image.
    private borrowing func opened() throws(ImageError) -> EncryptedData {
        guard let encryption else { throw ImageError(.encryption(.locked), file: file.name) }
        return encryption
    }

    /// Writes what a guest reads as zeros to host bytes.
    borrowing func writeZeroes(_ range: Range<UInt64>) throws(ImageError) {
        guard isEncrypted else { return try data.writeZeroes(range) }
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = min(range.upperBound &- offset, UInt64(ZeroArea.byteCount))
            try write(UnsafeRawBufferPointer(rebasing: ZeroArea.bytes[..<Int(count)]), at: offset)
            offset &+= count
        }
    }

    /// Makes host bytes read as zeros to a guest, and gives their space back where it can.
    borrowing func unmap(_ range: Range<UInt64>) throws(ImageError) {
        // A hole would not read as zeros once it is decrypted.
        if isEncrypted { return try writeZeroes(range) }
        try data.unmap(range)
    }

    /// Whether all host bytes from `host` on are what a guest reads as zeros, without a write.
    borrowing func isUntouched(from host: UInt64) -> Bool {
        !isEncrypted && data.isUntouched(from: host)
    }

    /// Makes sure that host bytes, whose content nobody needs, have space.
    borrowing func reserve(_ range: Range<UInt64>) throws(ImageError) { try data.reserve(range) }

    /// The address of host bytes for a reply, nil where they are not mapped as the guest reads
    /// them, or end before `byteCount`.
    @inline(__always)
    borrowing func address(of host: UInt64, byteCount: UInt64) -> UnsafeRawPointer? {
        guard let base = mappedBytes?.baseAddress, let room = mappedBytes?.count,
            host &+ byteCount <= min(data.writtenEnd, UInt64(room))
        else { return nil }
        return base + Int(truncatingIfNeeded: host)
    }

    /// The end of the host bytes that belong to the cluster at `host`: a data file ends with the
    /// disk, which need not end with a cluster.
    borrowing func clusterEnd(at host: UInt64, diskEnd: UInt64) -> UInt64 {
        let end = (host & ~map.clusterMask) &+ map.clusterMask &+ 1
        return hasDataFile ? min(end, diskEnd) : end
    }
}
