import QCOW2
import TestSupport
import Testing

/// One way to encrypt an image.
struct EncryptionSuite: Sendable, CustomTestStringConvertible {
    var suite: CipherSuite
    var hash = HashAlgorithm.sha256

    var testDescription: String {
        "\(suite.cipher.rawValue)-\(suite.mode.rawValue)-\(suite.ivGenerator.rawValue)"
            + (suite.ivHash.map { ":\($0.rawValue)" } ?? "") + ", \(hash.rawValue)"
    }

    /// As in `-o encrypt.…`.
    var words: [String] {
        [
            "cipher-alg=\(suite.cipher.rawValue)", "cipher-mode=\(suite.mode.rawValue)",
            "ivgen-alg=\(suite.ivGenerator.rawValue)", "hash-alg=\(hash.rawValue)",
        ] + (suite.ivHash.map { ["ivgen-hash-alg=\($0.rawValue)"] } ?? [])
    }

    /// Every cipher in every mode with every way to make vectors; the hashes take turns.
    static let every: [EncryptionSuite] = {
        var found: [EncryptionSuite] = []
        for cipher in CipherAlgorithm.allCases {
            for mode in CipherMode.allCases {
                let vectors: [(IVGenerator, HashAlgorithm?)] =
                    [(.plain, nil), (.plain64, nil)]
                    + HashAlgorithm.allCases.map { (.essiv, $0) }
                for (generator, hash) in vectors {
                    let suite = CipherSuite(
                        cipher: cipher, mode: mode, ivGenerator: generator, ivHash: hash)
                    let hashes = HashAlgorithm.allCases
                    found.append(
                        EncryptionSuite(suite: suite, hash: hashes[found.count % hashes.count]))
                }
            }
        }
        return found
    }()

    /// What the format allows.
    static let allowed = every.filter { $0.suite.contradiction == nil }

    /// Each cipher in each mode it has.
    static let pairs = allowed.enumerated().filter { index, suite in
        let same = allowed.indices.filter {
            allowed[$0].suite.cipher == suite.suite.cipher
                && allowed[$0].suite.mode == suite.suite.mode
        }
        return same[same[0] % same.count] == index
    }.map(\.element)

    /// Each cipher, each mode, each generator and each hash at least once.
    static let sample: [EncryptionSuite] = CipherAlgorithm.allCases.enumerated().compactMap {
        index, cipher in
        let mode = CipherMode.allCases[index % 4]
        let generator = IVGenerator.allCases[index % 3]
        let own = allowed.filter { $0.suite.cipher == cipher }
        let sameMode = own.filter { $0.suite.mode == mode }
        var found = sameMode.first { $0.suite.ivGenerator == generator } ?? sameMode.first
        found = found ?? own.first
        found?.hash = HashAlgorithm.allCases[index % 7]
        return found
    }
}
