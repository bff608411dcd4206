internal import CNettle

/// Decrypts a LUKS image's sectors without any of the engine's code: version 1 with AES-256 in XTS,
/// 64-bit sector numbers and SHA-256, which is what QEMU makes unless it is told otherwise.
package struct ReferenceCipher: Sendable {
    private var context = xts_aes256_key()

    /// Opens the first key slot of the LUKS header that `header` starts with.
    package init(
        header: UnsafeRawBufferPointer, passphrase: String
    ) throws(ReferenceReader.Fault) {
        func field(_ offset: Int) -> Int { Int(header.number(at: offset, as: UInt32.self)) }
        func salt(_ offset: Int) -> [UInt8] { Array(header[offset..<offset + 32]) }
        let keyByteCount = field(108)
        guard field(0) == 0x4c55_4b53, keyByteCount == 64 else {
            throw .init("no LUKS header with a key of 64 bytes")
        }
        let slot = 208
        let wrapping = Self.derived(
            Array(passphrase.utf8), salt(slot + 8), rounds: field(slot + 4), byteCount: 64)
        let stripeCount = field(slot + 44)
        let start = field(slot + 40) * 512
        var material = Array(header[start..<start + stripeCount * keyByteCount])
        Self(key: wrapping).decrypt(&material, firstSector: 0)
        let key = Self.merged(material, byteCount: keyByteCount)
        let digest = Self.derived(key, salt(132), rounds: field(164), byteCount: 20)
        guard digest.elementsEqual(header[112..<132]) else {
            throw .init("the passphrase does not open the first key slot")
        }
        self.init(key: key)
    }

    private init(key: [UInt8]) { nettle_xts_aes256_set_decrypt_key(&context, key) }

    /// - Parameter firstSector: The number of the first 512 bytes, by their place in the file.
    package func decrypt(_ bytes: inout [UInt8], firstSector: Int) {
        bytes.withUnsafeMutableBytes { decrypt($0, firstSector: firstSector) }
    }

    package func decrypt(_ bytes: UnsafeMutableRawBufferPointer, firstSector: Int) {
        // The function takes it for mutable, and changes nothing.
        var context = context
        for start in stride(from: 0, to: bytes.count, by: 512) {
            let sector = UInt64(firstSector + start / 512).littleEndian
            let tweak = withUnsafeBytes(of: sector) { Array($0) } + [UInt8](repeating: 0, count: 8)
            let place = (bytes.baseAddress! + start).assumingMemoryBound(to: UInt8.self)
            nettle_xts_aes256_decrypt_message(&context, tweak, 512, place, place)
        }
    }

    private static func derived(
        _ secret: [UInt8], _ salt: [UInt8], rounds: Int, byteCount: Int
    ) -> [UInt8] {
        var key = [UInt8](repeating: 0, count: byteCount)
        nettle_pbkdf2_hmac_sha256(
            secret.count, secret, UInt32(rounds), salt.count, salt, byteCount, &key)
        return key
    }

    /// Undoes the anti-forensic splitting: every stripe but the last is added and hashed.
    private static func merged(_ material: [UInt8], byteCount: Int) -> [UInt8] {
        var key = [UInt8](repeating: 0, count: byteCount)
        for start in stride(from: 0, to: material.count, by: byteCount) {
            if start > 0 { diffuse(&key) }
            for index in 0..<byteCount { key[index] ^= material[start + index] }
        }
        return key
    }

    /// Replaces each 32 bytes by the hash of their number and them.
    private static func diffuse(_ key: inout [UInt8]) {
        for block in 0..<key.count / 32 {
            var hash = sha256_ctx()
            nettle_sha256_init(&hash)
            let part = [0, 0, 0, UInt8(block)] + key[block * 32..<block * 32 + 32]
            nettle_sha256_update(&hash, part.count, part)
            var digest = [UInt8](repeating: 0, count: 32)
            nettle_sha256_digest(&hash, 32, &digest)
            key.replaceSubrange(block * 32..<block * 32 + 32, with: digest)
        }
    }
}
