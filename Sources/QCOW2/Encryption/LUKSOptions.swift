/// How a new image is encrypted; every part but the passphrase has the default that qemu-img has.
public struct LUKSOptions: Sendable {
    /// What the first key slot opens with.
    public var passphrase: Passphrase
    /// Cipher, mode and IV generator of the guest data.
    public var suite = CipherSuite()
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    public var hash = HashAlgorithm.sha256
    /// How long the passphrase is derived on this machine.
    public var milliseconds: UInt32 = 2000

    /// The options that `qemu-img create -o encrypt.format=luks` has by default.
    public init(passphrase: Passphrase) { self.passphrase = passphrase }

    /// What qemu-img refuses too, in words.
    var contradiction: String? {
        if passphrase.withoutNewline.isEmpty { return "the passphrase is empty" }
        if milliseconds == 0 { return "encrypt.iter-time must be 1 or more" }
        return suite.contradiction
    }
}
