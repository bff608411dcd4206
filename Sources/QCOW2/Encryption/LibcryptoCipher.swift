internal import CCrypto

/// AES by libcrypto, which uses the processor's instructions for it.
///
/// Contexts are copies of two that have the key, kept for the next request.
final class LibcryptoCipher: KeyedCipher, @unchecked Sendable {
    // `@unchecked`: the models are only copied, which libcrypto allows at once.
    private let encryptingModel: OpaquePointer
    private let decryptingModel: OpaquePointer
    private let encryptors = ContextPool(destroying: LibcryptoCipher.free)
    private let decryptors = ContextPool(destroying: LibcryptoCipher.free)
    private let hasIV: Bool

    /// Whether libcrypto has it: AES, but no XTS with 192 bits.
    static func has(_ cipher: CipherAlgorithm, _ mode: CipherMode) -> Bool {
        name(cipher, mode) != nil
    }

    private static func name(_ cipher: CipherAlgorithm, _ mode: CipherMode) -> String? {
        guard cipher.family == .aes, !(cipher == .aes192 && mode == .xts) else { return nil }
        return "\(cipher.rawValue)-\(mode.rawValue)"
    }

    init(
        _ cipher: CipherAlgorithm, _ mode: CipherMode, key: UnsafeRawBufferPointer
    ) throws(EncryptionError) {
        let name = Self.name(cipher, mode) ?? cipher.rawValue
        guard let method = crypto_EVP_CIPHER_fetch(nil, name, nil) else { throw .unavailable(name) }
        defer { crypto_EVP_CIPHER_free(method) }
        encryptingModel = try Self.model(method, key, encrypts: true, name)
        do throws(EncryptionError) {
            decryptingModel = try Self.model(method, key, encrypts: false, name)
        } catch {
            crypto_EVP_CIPHER_CTX_free(encryptingModel)
            throw error
        }
        hasIV = mode != .ecb
    }

    deinit {
        crypto_EVP_CIPHER_CTX_free(encryptingModel)
        crypto_EVP_CIPHER_CTX_free(decryptingModel)
    }

    private static func model(
        _ method: OpaquePointer, _ key: UnsafeRawBufferPointer, encrypts: Bool, _ name: String
    ) throws(EncryptionError) -> OpaquePointer {
        guard let context = crypto_EVP_CIPHER_CTX_new() else { throw .outOfMemory }
        let bytes = key.baseAddress?.assumingMemoryBound(to: UInt8.self)
        guard Int(crypto_EVP_CIPHER_get_key_length(method)) == key.count,
            crypto_EVP_CipherInit_ex2(context, method, bytes, nil, encrypts ? 1 : 0, nil) == 1,
            crypto_EVP_CIPHER_CTX_set_padding(context, 0) == 1
        else {
            crypto_EVP_CIPHER_CTX_free(context)
            throw .failed("setting the key of \(name)")
        }
        return context
    }

    @Sendable
    private static func free(_ context: UnsafeMutableRawPointer) {
        crypto_EVP_CIPHER_CTX_free(OpaquePointer(context))
    }

    func begin(_ direction: CipherDirection) -> UnsafeMutableRawPointer? {
        let idle = direction == .encrypt ? encryptors.take() : decryptors.take()
        if let idle { return idle }
        guard let context = crypto_EVP_CIPHER_CTX_new() else { return nil }
        let model = direction == .encrypt ? encryptingModel : decryptingModel
        guard crypto_EVP_CIPHER_CTX_copy(context, model) == 1 else {
            crypto_EVP_CIPHER_CTX_free(context)
            return nil
        }
        return UnsafeMutableRawPointer(context)
    }

    func apply(
        _ direction: CipherDirection, with context: UnsafeMutableRawPointer,
        iv: UnsafeMutablePointer<UInt8>, from source: UnsafePointer<UInt8>,
        to target: UnsafeMutablePointer<UInt8>, byteCount: Int
    ) -> Bool {
        let context = OpaquePointer(context)
        if hasIV, crypto_EVP_CipherInit_ex(context, nil, nil, nil, iv, -1) != 1 { return false }
        var done: Int32 = 0
        return crypto_EVP_CipherUpdate(context, target, &done, source, Int32(byteCount)) == 1
            && Int(done) == byteCount
    }

    func end(_ direction: CipherDirection, _ context: UnsafeMutableRawPointer) {
        if direction == .encrypt { encryptors.give(context) } else { decryptors.give(context) }
    }

    func close() {
        encryptors.drain()
        decryptors.drain()
        // The models lose their keys too, and stay valid for `deinit`.
        crypto_EVP_CIPHER_CTX_reset(encryptingModel)
        crypto_EVP_CIPHER_CTX_reset(decryptingModel)
    }
}
