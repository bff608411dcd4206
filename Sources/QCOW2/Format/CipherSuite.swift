/// A block cipher with its key length, by the name that `qemu-img` has for it.
public enum CipherAlgorithm: String, Sendable, CaseIterable {
    /// AES (FIPS 197), a key of 16 bytes.
    case aes128 = "aes-128"
    /// AES, a key of 24 bytes.
    case aes192 = "aes-192"
    /// AES, a key of 32 bytes; what `qemu-img` takes for new images.
    case aes256 = "aes-256"
    /// CAST5 (RFC 2144), a key of 16 bytes and blocks of 8.
    case cast5 = "cast5-128"
    /// Serpent, a key of 16 bytes.
    case serpent128 = "serpent-128"
    /// Serpent, a key of 24 bytes.
    case serpent192 = "serpent-192"
    /// Serpent, a key of 32 bytes.
    case serpent256 = "serpent-256"
    /// Twofish, a key of 16 bytes.
    case twofish128 = "twofish-128"
    /// Twofish, a key of 24 bytes.
    case twofish192 = "twofish-192"
    /// Twofish, a key of 32 bytes.
    case twofish256 = "twofish-256"

    /// What a LUKS header calls it; the length of the key stands elsewhere.
    public enum Family: String, Sendable, CaseIterable {
        /// AES.
        case aes
        /// CAST5.
        case cast5
        /// Serpent.
        case serpent
        /// Twofish.
        case twofish
    }

    /// The cipher without its key length.
    public var family: Family {
        switch self {
        case .aes128, .aes192, .aes256: .aes
        case .cast5: .cast5
        case .serpent128, .serpent192, .serpent256: .serpent
        case .twofish128, .twofish192, .twofish256: .twofish
        }
    }

    /// Bytes of a key.
    public var keyByteCount: Int {
        switch self {
        case .aes128, .cast5, .serpent128, .twofish128: 16
        case .aes192, .serpent192, .twofish192: 24
        case .aes256, .serpent256, .twofish256: 32
        }
    }

    /// Bytes of a block.
    public var blockByteCount: Int { self == .cast5 ? 8 : 16 }

    init?(_ family: Family, keyByteCount: Int) {
        let found = Self.allCases.first { $0.family == family && $0.keyByteCount == keyByteCount }
        guard let found else { return nil }
        self = found
    }
}

/// How blocks of a sector are chained.
public enum CipherMode: String, Sendable, CaseIterable {
    /// Each block alone.
    case ecb
    /// Each block with the one before it.
    case cbc
    /// Each block with its place in the sector (IEEE 1619).
    case xts
    /// A stream of encrypted numbers.
    case ctr
}

/// How a sector's number becomes an initialization vector.
public enum IVGenerator: String, Sendable, CaseIterable {
    /// The low 32 bits, little-endian.
    case plain
    /// All 64 bits, little-endian.
    case plain64
    /// `plain64`, encrypted with a hash of the key.
    case essiv
}

/// A hash function, by the name that LUKS headers and `qemu-img` have for it.
public enum HashAlgorithm: String, Sendable, CaseIterable {
    /// Known to be weak; found in old volumes.
    case md5, sha1
    /// A member of the SHA-2 family (FIPS 180-4).
    case sha224, sha256, sha384, sha512
    /// RIPEMD-160.
    case ripemd160

    /// Bytes of a digest.
    public var byteCount: Int {
        switch self {
        case .md5: 16
        case .sha1, .ripemd160: 20
        case .sha224: 28
        case .sha256: 32
        case .sha384: 48
        case .sha512: 64
        }
    }
}

/// Cipher, mode and IV generator: everything about encrypted sectors but the key.
public struct CipherSuite: Sendable, Hashable {
    /// What encrypts a block.
    public var cipher: CipherAlgorithm
    /// How the blocks of a sector are chained.
    public var mode: CipherMode
    /// What makes a sector's initialization vector.
    public var ivGenerator: IVGenerator
    /// The hash of `.essiv`; other generators may name one, which says nothing.
    public var ivHash: HashAlgorithm?

    /// The suite that `qemu-img` takes for new images, as far as nothing else is said.
    public init(
        cipher: CipherAlgorithm = .aes256, mode: CipherMode = .xts,
        ivGenerator: IVGenerator = .plain64, ivHash: HashAlgorithm? = nil
    ) {
        self.cipher = cipher
        self.mode = mode
        self.ivGenerator = ivGenerator
        self.ivHash = ivHash
    }

    /// Bytes of the whole key: XTS takes two.
    public var keyByteCount: Int { cipher.keyByteCount * (mode == .xts ? 2 : 1) }

    /// The cipher under which `.essiv` encrypts sector numbers: of the same family, with keys as
    /// long as the hash's digests; nil where there is none.
    var essivCipher: CipherAlgorithm? {
        guard ivGenerator == .essiv, let ivHash, cipher.family != .cast5 else { return nil }
        return CipherAlgorithm(cipher.family, keyByteCount: ivHash.byteCount)
    }

    /// Why there is no such encryption, in words; nil where there is.
    package var contradiction: String? {
        if mode == .xts, cipher.blockByteCount != 16 {
            return "\(cipher.rawValue) has blocks of 8 bytes, the mode xts needs 16"
        }
        if keyByteCount * Int(Limits.luksStripes) % 512 != 0 {
            // QEMU stops at an assertion where it meets such a key.
            return "\(cipher.rawValue) in the mode \(mode.rawValue) has key material that fills "
                + "no whole sectors, which QEMU does not open"
        }
        if ivGenerator == .essiv, essivCipher == nil {
            return "\(cipher.rawValue) has no essiv with the hash \(ivHash?.rawValue ?? "none")"
        }
        return nil
    }

    // MARK: As a LUKS header has it

    /// - Parameters:
    ///   - name: the cipher's, such as `aes`.
    ///   - specification: mode, generator and its hash, such as `cbc-essiv:sha256`.
    ///   - keyByteCount: bytes of the whole key.
    init(name: String, specification: String, keyByteCount: Int) throws(FormatError) {
        let family = try Self.known(CipherAlgorithm.Family.self, name, "cipher")
        let parts = specification.split(
            separator: "-", maxSplits: 1, omittingEmptySubsequences: false)
        mode = try Self.known(CipherMode.self, String(parts[0]), "cipher mode")
        let generator = (parts.count > 1 ? parts[1] : "").split(
            separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
        ivGenerator = try Self.known(
            IVGenerator.self, generator.first.map(String.init) ?? "", "IV generator")
        if generator.count > 1 {
            ivHash = try Self.known(HashAlgorithm.self, String(generator[1]), "IV generator's hash")
        }
        let ownKeyByteCount = mode == .xts ? keyByteCount / 2 : keyByteCount
        guard let cipher = CipherAlgorithm(family, keyByteCount: ownKeyByteCount),
            mode != .xts || keyByteCount % 2 == 0
        else {
            throw .inconsistent(
                "the LUKS header asks for \(name)-\(mode.rawValue) with keys of "
                    + "\(keyByteCount) bytes, which does not exist")
        }
        self.cipher = cipher
        if let contradiction { throw .inconsistent("LUKS header: \(contradiction)") }
    }

    /// The mode with its IV generator, as a LUKS header has it.
    var specification: String {
        "\(mode.rawValue)-\(ivGenerator.rawValue)" + (ivHash.map { ":\($0.rawValue)" } ?? "")
    }

    /// The value that a name in a LUKS header stands for.
    static func known<Value: RawRepresentable<String> & CaseIterable>(
        _ type: Value.Type, _ name: String, _ what: String
    ) throws(FormatError) -> Value {
        guard let value = Value(rawValue: name) else {
            throw .unknownName(
                "LUKS \(what)", name: name,
                known: Value.allCases.map(\.rawValue).joined(separator: ", "))
        }
        return value
    }
}
