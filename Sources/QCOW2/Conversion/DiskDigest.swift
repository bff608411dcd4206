/// The hash of a whole disk.
public enum DiskDigest {
    /// The hash functions, by the name of the program that has them: `sha1sum`, `sha256sum`.
    public enum Algorithm: String, Sendable {
        /// SHA-1 (FIPS 180-4), 20 bytes.
        case sha1
        /// SHA-256 (FIPS 180-4), 32 bytes.
        case sha256
    }

    /// Hashes the bytes of `source`; holes are not read, only hashed as the zeros that they are.
    ///
    /// - Parameters:
    ///   - algorithm: The hash function.
    ///   - source: The disk.
    ///   - progress: Told what part is done; false cancels.
    /// - Throws: what reading throws; `.cancelled`.
    public static func compute(
        _ algorithm: Algorithm, of source: SourceDisk, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) -> [UInt8] {
        let digest = try NamedDigest(algorithm == .sha1 ? .sha1 : .sha256, of: source.name)
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        var known = KnownRun()
        var offset: UInt64 = 0
        while offset < source.size {
            let run = try known.run(of: source, at: offset)
            let count = min(run.byteCount, UInt64(buffer.count))
            if run.isHole {
                try digest.update(UnsafeRawBufferPointer(rebasing: ZeroArea.bytes[..<Int(count)]))
            } else {
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(count)])
                try source.read(into: part, at: offset)
                try digest.update(UnsafeRawBufferPointer(part))
            }
            offset &+= count
            if let progress, !progress(Double(offset) / Double(source.size)) {
                throw ImageError(.cancelled, file: source.name)
            }
        }
        return try digest.end()
    }
}

/// A digest whose errors name the disk.
private struct NamedDigest: ~Copyable {
    private let digest: Digest
    private let name: String

    init(_ algorithm: HashAlgorithm, of name: String) throws(ImageError) {
        self.name = name
        do throws(EncryptionError) {
            let digest = try Digest(algorithm)
            try digest.begin()
            self.digest = digest
        } catch {
            throw ImageError(.encryption(error), file: name)
        }
    }

    func update(_ bytes: UnsafeRawBufferPointer) throws(ImageError) {
        do throws(EncryptionError) {
            try digest.update(bytes)
        } catch {
            throw ImageError(.encryption(error), file: name)
        }
    }

    func end() throws(ImageError) -> [UInt8] {
        do throws(EncryptionError) {
            return try digest.end()
        } catch {
            throw ImageError(.encryption(error), file: name)
        }
    }
}
