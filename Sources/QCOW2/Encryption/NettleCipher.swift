internal import CNettle

/// A cipher that libcrypto has not: Serpent, Twofish, CAST5, and AES-192 in XTS.
///
/// Its contexts are read only once they have the key, so that all threads use the same ones.
final class NettleCipher: KeyedCipher, @unchecked Sendable {
    // `@unchecked`: written by `init` and `close` alone.
    private let method: UnsafePointer<nettle_cipher>
    private let mode: CipherMode
    private let blockByteCount: Int
    /// Three contexts side by side: encrypting, decrypting, and for the tweak of XTS.
    private let memory: UnsafeMutableRawBufferPointer
    private let contextByteCount: Int

    init(
        _ cipher: CipherAlgorithm, _ mode: CipherMode, key: UnsafeRawBufferPointer
    ) throws(EncryptionError) {
        let keyByteCount = cipher.keyByteCount
        guard let method = qcowfs_cipher(Self.family(of: cipher), keyByteCount),
            key.count == keyByteCount * (mode == .xts ? 2 : 1),
            let bytes = key.baseAddress?.assumingMemoryBound(to: UInt8.self)
        else { throw .unavailable("\(cipher.rawValue)-\(mode.rawValue)") }
        self.method = method
        self.mode = mode
        blockByteCount = Int(method.pointee.block_size)
        contextByteCount = (Int(method.pointee.context_size) + 63) & ~63
        memory = .allocate(byteCount: contextByteCount * 3, alignment: 64)
        method.pointee.set_encrypt_key(memory.baseAddress, bytes)
        method.pointee.set_decrypt_key(memory.baseAddress.map { $0 + contextByteCount }, bytes)
        method.pointee.set_encrypt_key(
            memory.baseAddress.map { $0 + 2 * contextByteCount },
            mode == .xts ? bytes + keyByteCount : bytes)
    }

    deinit {
        close()
        memory.deallocate()
    }

    private static func family(of cipher: CipherAlgorithm) -> qcowfs_cipher_family {
        switch cipher.family {
        case .aes: QCOWFS_AES
        case .cast5: QCOWFS_CAST5
        case .serpent: QCOWFS_SERPENT
        case .twofish: QCOWFS_TWOFISH
        }
    }

    /// The counter mode encrypts in both directions.
    func begin(_ direction: CipherDirection) -> UnsafeMutableRawPointer? {
        let isForward = direction == .encrypt || mode == .ctr
        return memory.baseAddress.map { isForward ? $0 : $0 + contextByteCount }
    }

    func end(_ direction: CipherDirection, _ context: UnsafeMutableRawPointer) {}

    func apply(
        _ direction: CipherDirection, with context: UnsafeMutableRawPointer,
        iv: UnsafeMutablePointer<UInt8>, from source: UnsafePointer<UInt8>,
        to target: UnsafeMutablePointer<UInt8>, byteCount: Int
    ) -> Bool {
        let (encrypt, decrypt) = (method.pointee.encrypt, method.pointee.decrypt)
        let tweak = memory.baseAddress.map { $0 + 2 * contextByteCount }
        switch (mode, direction) {
        case (.ecb, .encrypt): encrypt?(context, byteCount, target, source)
        case (.ecb, .decrypt): decrypt?(context, byteCount, target, source)
        case (.cbc, .encrypt):
            nettle_cbc_encrypt(context, encrypt, blockByteCount, iv, byteCount, target, source)
        case (.cbc, .decrypt):
            nettle_cbc_decrypt(context, decrypt, blockByteCount, iv, byteCount, target, source)
        case (.ctr, _):
            nettle_ctr_crypt(context, encrypt, blockByteCount, iv, byteCount, target, source)
        case (.xts, .encrypt):
            nettle_xts_encrypt_message(context, tweak, encrypt, iv, byteCount, target, source)
        case (.xts, .decrypt):
            nettle_xts_decrypt_message(
                context, tweak, decrypt, encrypt, iv, byteCount, target, source)
        }
        return true
    }

    func close() { memory.wipe() }
}
