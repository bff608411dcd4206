/// Why encrypted data stays closed, or cannot be made.
public enum EncryptionError: Error, Equatable, Sendable, CustomStringConvertible {
    /// There is no passphrase, and nobody to ask for one.
    case passphraseNeeded
    /// No key slot opens with any passphrase that was given.
    case wrongPassphrase
    /// The image was opened for its metadata alone, without a passphrase.
    case locked
    /// The LUKS header has no active key slot: nothing opens it any more.
    case noKeySlot
    /// So many rounds of PBKDF2 that opening would take too long.
    case tooManyRounds(UInt32, of: String, seconds: Int)
    /// Legacy AES has no check of the passphrase, and is read only.
    case writingLegacyAES
    /// The libraries have no such cipher or hash.
    case unavailable(String)
    /// The key derivation or a cipher got no memory.
    case outOfMemory
    /// A library failed at what cannot fail; the words name the operation.
    case failed(String)

    public var description: String {
        switch self {
        case .passphraseNeeded:
            "encrypted: give its passphrase with --passphrase-file FILE"
        case .wrongPassphrase: "the passphrase is wrong: no key slot opens with it"
        case .locked: "encrypted, and opened without its passphrase"
        case .noKeySlot: "encrypted, and no key slot is left to open it with"
        case .tooManyRounds(let rounds, let what, let seconds):
            "\(what) asks for \(rounds) rounds of PBKDF2, about \(seconds) s on this machine "
                + "(the limit is \(Int(Limits.keyDerivationSeconds)) s)"
        case .writingLegacyAES:
            "has the legacy AES encryption, which is only read: give --read-only"
        case .unavailable(let name): "encrypted with \(name), which the libraries here do not have"
        case .outOfMemory: "there is no memory for the cipher"
        case .failed(let operation): "\(operation) failed"
        }
    }
}
