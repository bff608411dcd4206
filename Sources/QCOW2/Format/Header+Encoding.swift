// The bytes of a header: the fixed part, its extensions, the backing file's name.

extension Header {
    /// Bytes of the known fixed part that we write, compression type and padding included.
    static let writtenByteCountV3: UInt32 = 112

    /// Bytes of the fixed part that `encoded` makes.
    var encodedByteCount: UInt32 {
        version >= 3
            ? Header.writtenByteCountV3 &+ UInt32(truncatingIfNeeded: unknownFields.count)
            : Header.byteCountV2
    }

    /// The bytes from offset 0 to the end of the backing file's name, or of the extensions.
    ///
    /// `byteCount`, `backingFileOffset` and `backingFileByteCount` follow from what is encoded, and
    /// are not looked at.
    /// - Throws: `.tooLarge` where they do not fit in the first cluster.
    package func encoded() throws(FormatError) -> [UInt8] {
        var bytes = encodedFixedPart()
        for part in extensions {
            bytes.appendBigEndian(part.type)
            bytes.appendBigEndian(UInt32(clamping: part.data.count))
            bytes += part.data
            bytes.pad(toMultipleOf: 8)
        }
        bytes.appendBigEndian(HeaderExtension.end)
        bytes.appendBigEndian(UInt32(0))
        if let backingFile {
            // A name that nobody changed stays as it is, whatever its bytes are.
            let isUnchanged = String(decoding: backingFileBytes, as: UTF8.self) == backingFile
            let name = isUnchanged ? backingFileBytes : Array(backingFile.utf8)
            bytes.storeBigEndian(UInt64(bytes.count), at: 8)
            bytes.storeBigEndian(UInt32(clamping: name.count), at: 16)
            bytes += name
        }
        guard UInt64(bytes.count) <= clusterByteCount else {
            throw .tooLarge(
                "header with its extensions and the backing file's name",
                value: UInt64(bytes.count), limit: clusterByteCount)
        }
        return bytes
    }

    private func encodedFixedPart() -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(Header.magic)
        bytes.appendBigEndian(version)
        bytes.appendBigEndian(UInt64(0))  // the backing file's name, filled in when it is placed
        bytes.appendBigEndian(UInt32(0))
        bytes.appendBigEndian(clusterBits)
        bytes.appendBigEndian(size)
        bytes.appendBigEndian(encryptionMethod)
        bytes.appendBigEndian(l1EntryCount)
        bytes.appendBigEndian(l1Offset)
        bytes.appendBigEndian(refcountTableOffset)
        bytes.appendBigEndian(refcountTableClusterCount)
        bytes.appendBigEndian(snapshotCount)
        bytes.appendBigEndian(snapshotsOffset)
        guard version >= 3 else { return bytes }
        bytes.appendBigEndian(incompatibleFeatures.rawValue)
        bytes.appendBigEndian(compatibleFeatures.rawValue)
        bytes.appendBigEndian(autoclearFeatures.rawValue)
        bytes.appendBigEndian(refcountOrder)
        bytes.appendBigEndian(encodedByteCount)
        bytes.append(compressionType.rawValue)
        bytes.pad(toMultipleOf: 8)
        bytes += unknownFields
        return bytes
    }
}

extension HeaderExtension {
    /// The names of all feature bits, for programs that do not know one of them.
    ///
    /// A record has 48 bytes: kind (0 incompatible, 1 compatible, 2 autoclear), bit, name.
    static let featureNameTable: HeaderExtension = {
        let names: [(kind: UInt8, bit: UInt8, name: String)] = [
            (0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 2, "external data file"),
            (0, 3, "compression type"), (0, 4, "extended L2 entries"), (1, 0, "lazy refcounts"),
            (2, 0, "bitmaps"), (2, 1, "raw external data"),
        ]
        var data: [UInt8] = []
        for record in names {
            data += [record.kind, record.bit] + Array(record.name.utf8)
            data.pad(toMultipleOf: 48)
        }
        return HeaderExtension(type: featureNames, data: data)
    }()
}

extension Array where Element == UInt8 {
    fileprivate mutating func appendBigEndian<Integer: FixedWidthInteger & BitwiseCopyable>(
        _ value: Integer
    ) {
        append(contentsOf: repeatElement(0, count: MemoryLayout<Integer>.size))
        storeBigEndian(value, at: count - MemoryLayout<Integer>.size)
    }

    fileprivate mutating func pad(toMultipleOf unit: Int) {
        append(contentsOf: repeatElement(0, count: (unit - count % unit) % unit))
    }
}
