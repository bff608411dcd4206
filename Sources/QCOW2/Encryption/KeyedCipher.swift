/// Whether bytes become secret or readable.
enum CipherDirection { case encrypt, decrypt }

/// A block cipher in one mode with its key; any number of threads may use it.
protocol KeyedCipher: AnyObject, Sendable {
    /// What a thread works with until `end`; nil where there is no memory for it.
    func begin(_ direction: CipherDirection) -> UnsafeMutableRawPointer?

    /// Turns `byteCount` bytes of `source`, whole blocks, into as many of `target`, which may be
    /// the same.  `iv` has 16 bytes, and is anything afterwards.
    func apply(
        _ direction: CipherDirection, with context: UnsafeMutableRawPointer,
        iv: UnsafeMutablePointer<UInt8>, from source: UnsafePointer<UInt8>,
        to target: UnsafeMutablePointer<UInt8>, byteCount: Int
    ) -> Bool

    func end(_ direction: CipherDirection, _ context: UnsafeMutableRawPointer)

    /// Wipes the key; nobody may use the cipher afterwards.
    func close()
}

extension CipherSuite {
    /// The fastest implementation there is: libcrypto's for AES, nettle's for what it has not.
    static func keyed(
        _ cipher: CipherAlgorithm, _ mode: CipherMode, key: UnsafeRawBufferPointer
    ) throws(EncryptionError) -> any KeyedCipher {
        if LibcryptoCipher.has(cipher, mode) {
            return try LibcryptoCipher(cipher, mode, key: key)
        }
        return try NettleCipher(cipher, mode, key: key)
    }
}
