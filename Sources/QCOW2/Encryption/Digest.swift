internal import CCrypto
internal import Glibc

/// A hash function of libcrypto, ready for use by one thread.
struct Digest: ~Copyable {
    let algorithm: HashAlgorithm
    let method: OpaquePointer
    private let context: OpaquePointer

    init(_ algorithm: HashAlgorithm) throws(EncryptionError) {
        self.algorithm = algorithm
        guard let method = crypto_EVP_MD_fetch(nil, algorithm.rawValue, nil) else {
            throw .unavailable(algorithm.rawValue)
        }
        guard let context = crypto_EVP_MD_CTX_new() else {
            crypto_EVP_MD_free(method)
            throw .outOfMemory
        }
        self.method = method
        self.context = context
    }

    deinit {
        crypto_EVP_MD_CTX_free(context)
        crypto_EVP_MD_free(method)
    }

    /// Hashes `parts`, one after the other, into the start of `digest`.
    func hash(
        _ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer? = nil,
        into digest: UnsafeMutableRawBufferPointer
    ) throws(EncryptionError) {
        var isDone = crypto_EVP_DigestInit_ex2(context, method, nil) == 1
        isDone = isDone && crypto_EVP_DigestUpdate(context, first.baseAddress, first.count) == 1
        if let second {
            isDone =
                isDone && crypto_EVP_DigestUpdate(context, second.baseAddress, second.count) == 1
        }
        let target = digest.baseAddress?.assumingMemoryBound(to: UInt8.self)
        guard isDone, crypto_EVP_DigestFinal_ex(context, target, nil) == 1 else {
            throw .failed("hashing with \(algorithm.rawValue)")
        }
    }
}

/// Hashing in pieces.
extension Digest {
    func begin() throws(EncryptionError) {
        guard crypto_EVP_DigestInit_ex2(context, method, nil) == 1 else { throw failure }
    }

    func update(_ bytes: UnsafeRawBufferPointer) throws(EncryptionError) {
        guard crypto_EVP_DigestUpdate(context, bytes.baseAddress, bytes.count) == 1 else {
            throw failure
        }
    }

    /// The hash of everything since `begin`.
    func end() throws(EncryptionError) -> [UInt8] {
        var digest = [UInt8](repeating: 0, count: algorithm.byteCount)
        guard crypto_EVP_DigestFinal_ex(context, &digest, nil) == 1 else { throw failure }
        return digest
    }

    private var failure: EncryptionError { .failed("hashing with \(algorithm.rawValue)") }
}
