internal import CCrypto
internal import Glibc

/// PBKDF2 (RFC 8018): keys from passphrases, slowly on purpose.
struct KeyDerivation: ~Copyable {
    private let digest: Digest

    init(_ hash: HashAlgorithm) throws(EncryptionError) { digest = try Digest(hash) }

    /// A key of `byteCount` bytes.
    func key(
        from passphrase: UnsafeRawBufferPointer, salt: [UInt8], iterations: UInt32, byteCount: Int
    ) throws(EncryptionError) -> SecretBytes {
        try SecretBytes(count: byteCount) { key throws(EncryptionError) in
            // An empty passphrase has no address, and libcrypto wants one.
            let words = passphrase.isEmpty ? UnsafeRawBufferPointer(key) : passphrase
            let status = crypto_PKCS5_PBKDF2_HMAC(
                words.baseAddress?.assumingMemoryBound(to: CChar.self), Int32(passphrase.count),
                salt, Int32(salt.count), Int32(clamping: iterations), digest.method,
                Int32(byteCount), key.baseAddress?.assumingMemoryBound(to: UInt8.self))
            guard status == 1 else { throw .failed("deriving a key from the passphrase") }
        }
    }

    /// Throws where `iterations` would take longer than anybody should wait.
    /// - Parameter what: names the asker in the message.
    func judge(
        _ iterations: UInt32, byteCount: Int, of what: @autoclosure () -> String
    ) throws(EncryptionError) {
        // So few that any machine does them in no time.
        guard iterations > 100_000 else { return }
        let seconds = Double(iterations) / (try iterationsPerSecond(byteCount: byteCount))
        guard seconds <= Limits.keyDerivationSeconds, iterations <= Int32.max else {
            throw .tooManyRounds(iterations, of: what(), seconds: Int(seconds.rounded(.up)))
        }
    }

    /// How many rounds this machine does for a key of `byteCount` bytes.
    ///
    /// The thread's own time is measured, so that a busy machine does not look slow.
    func iterationsPerSecond(byteCount: Int) throws(EncryptionError) -> Double {
        var iterations: UInt32 = 1 << 13
        let salt = [UInt8](repeating: 0x5a, count: LUKSHeader.saltByteCount)
        while true {
            let start = Self.threadSeconds
            _ = try salt.withRawBytes { passphrase throws(EncryptionError) in
                try key(
                    from: passphrase, salt: salt, iterations: iterations, byteCount: byteCount)
            }
            let seconds = Self.threadSeconds - start
            if seconds > 0.008 || iterations >= 1 << 24 {
                return Double(iterations) / max(seconds, 1e-6)
            }
            iterations *= 2
        }
    }

    private static var threadSeconds: Double {
        var time = timespec()
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}

/// Bytes that nobody can guess.
enum RandomBytes {
    static func fill(_ buffer: UnsafeMutableRawBufferPointer) throws(EncryptionError) {
        guard
            crypto_RAND_priv_bytes(
                buffer.baseAddress?.assumingMemoryBound(to: UInt8.self), Int32(buffer.count)) == 1
        else { throw .failed("drawing random numbers") }
    }

    static func make(_ count: Int) throws(EncryptionError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        try bytes.withMutableRawBytes { buffer throws(EncryptionError) in try fill(buffer) }
        return bytes
    }
}
