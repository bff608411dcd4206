internal import QCOW2

/// What `create -o encrypt.…` says, by the names that qemu-img has for it.
struct EncryptionWords: ImageOptionReader {
    /// Set by `encrypt.format=luks`.
    private(set) var isWanted = false
    private var suite = CipherSuite()
    private var hash = HashAlgorithm.sha256
    private var milliseconds: UInt32 = 2000
    let image: String
    private var first: String?

    init(image: String) { self.image = image }

    /// Whether `name` is one of these options.
    static func has(_ name: String) -> Bool {
        name.hasPrefix("encrypt.") || name == "encryption"
    }

    mutating func set(_ name: String, to value: String) throws {
        first = first ?? name
        switch name {
        case "encrypt.format":
            guard value == "luks" else { throw refused(value, of: name, "luks; aes is only read") }
            isWanted = true
        case "encryption":
            guard try !isOn(value, of: name) else {
                throw Failure(image, "encryption=\(value) is legacy AES: give encrypt.format=luks")
            }
            first = nil
        case "encrypt.cipher-alg": suite.cipher = try choice(value, of: name)
        case "encrypt.cipher-mode": suite.mode = try choice(value, of: name)
        case "encrypt.ivgen-alg": suite.ivGenerator = try choice(value, of: name)
        case "encrypt.ivgen-hash-alg": suite.ivHash = try choice(value, of: name) as HashAlgorithm
        case "encrypt.hash-alg": hash = try choice(value, of: name)
        case "encrypt.iter-time":
            guard let number = UInt32(value), (1...600_000).contains(number) else {
                throw refused(value, of: name, "1 to 600000 milliseconds")
            }
            milliseconds = number
        case "encrypt.key-secret":
            throw Failure(image, "\(name): the passphrase comes from --passphrase-file FILE")
        default:
            throw Failure(image, "there is no option '\(name)' (qcowfs help create lists them)")
        }
    }

    /// The encryption that was asked for; nil without any.
    func options(_ passphrase: () throws -> Passphrase) throws -> LUKSOptions? {
        guard isWanted else {
            if let first { throw Failure(image, "\(first) needs encrypt.format=luks") }
            return nil
        }
        var options = LUKSOptions(passphrase: try passphrase())
        options.suite = suite
        if suite.ivGenerator == .essiv, suite.ivHash == nil { options.suite.ivHash = .sha256 }
        options.hash = hash
        options.milliseconds = milliseconds
        return options
    }

    private func choice<Value: RawRepresentable<String> & CaseIterable>(
        _ value: String, of name: String
    ) throws -> Value {
        guard let chosen = Value(rawValue: value) else {
            throw refused(
                value, of: name, Value.allCases.map(\.rawValue).joined(separator: ", "))
        }
        return chosen
    }
}
