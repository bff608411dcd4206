/// Encrypts and decrypts sectors of 512 bytes, each with an initialization vector made of its
/// number; any number of threads may use one.
final class SectorCipher: Sendable {
    static let sectorByteCount = 512

    private let cipher: any KeyedCipher
    private let generator: IVGenerator
    /// What `.essiv` encrypts sector numbers with.
    private let essiv: (any KeyedCipher)?

    init(_ suite: CipherSuite, key: UnsafeRawBufferPointer) throws(EncryptionError) {
        cipher = try CipherSuite.keyed(suite.cipher, suite.mode, key: key)
        generator = suite.ivGenerator
        guard let essivCipher = suite.essivCipher, let hash = suite.ivHash else {
            essiv = nil
            return
        }
        let digest = try Digest(hash)
        let hashed = try SecretBytes(count: hash.byteCount) { hashed throws(EncryptionError) in
            try digest.hash(key, into: hashed)
        }
        essiv = try CipherSuite.keyed(essivCipher, .ecb, key: hashed.bytes)
    }

    /// Turns `source` into `target`, which is as long and may be the same memory.
    /// - Parameter sector: the number of the first one; the last one may be cut short after a
    ///   whole block.
    func apply(
        _ direction: CipherDirection, from source: UnsafeRawBufferPointer,
        to target: UnsafeMutableRawBufferPointer, sector: UInt64
    ) throws(EncryptionError) {
        guard let context = cipher.begin(direction) else { throw .outOfMemory }
        defer { cipher.end(direction, context) }
        var iv: (UInt64, UInt64) = (0, 0)
        let isDone = withUnsafeMutableBytes(of: &iv) { iv in
            applyAll(direction, context, iv, source, target, sector)
        }
        guard isDone else {
            throw .failed(direction == .encrypt ? "encrypting" : "decrypting")
        }
    }

    @inline(__always)
    private func applyAll(
        _ direction: CipherDirection, _ context: UnsafeMutableRawPointer,
        _ iv: UnsafeMutableRawBufferPointer, _ source: UnsafeRawBufferPointer,
        _ target: UnsafeMutableRawBufferPointer, _ first: UInt64
    ) -> Bool {
        guard let from = source.baseAddress?.assumingMemoryBound(to: UInt8.self),
            let to = target.baseAddress?.assumingMemoryBound(to: UInt8.self),
            let vector = iv.baseAddress?.assumingMemoryBound(to: UInt8.self)
        else { return source.isEmpty }
        var done = 0
        var sector = first
        while done < source.count {
            guard fill(iv, vector, sector) else { return false }
            let count = min(Self.sectorByteCount, source.count &- done)
            let isDone = cipher.apply(
                direction, with: context, iv: vector, from: from + done, to: to + done,
                byteCount: count)
            guard isDone else { return false }
            done &+= count
            sector &+= 1
        }
        return true
    }

    /// Makes the initialization vector of a sector.
    @inline(__always)
    private func fill(
        _ iv: UnsafeMutableRawBufferPointer, _ bytes: UnsafeMutablePointer<UInt8>, _ sector: UInt64
    ) -> Bool {
        let number = generator == .plain ? sector & 0xffff_ffff : sector
        iv.storeBytes(of: number.littleEndian, as: UInt64.self)
        iv.storeBytes(of: 0, toByteOffset: 8, as: UInt64.self)
        guard let essiv else { return true }
        guard let context = essiv.begin(.encrypt) else { return false }
        defer { essiv.end(.encrypt, context) }
        // A block in place; ECB looks at no vector.
        return essiv.apply(
            .encrypt, with: context, iv: bytes, from: bytes, to: bytes, byteCount: iv.count)
    }

    /// Wipes the keys; nobody may use the cipher afterwards.
    func close() {
        cipher.close()
        essiv?.close()
    }
}
