/// Opens the encrypted files of one chain, top first, with the passphrases there are.
struct Unlocker {
    private let source: PassphraseSource
    /// The ones given, or those that were asked for so far.
    private var passphrases: [Passphrase]
    private var encryptedCount = 0

    init(_ source: PassphraseSource) {
        self.source = source
        passphrases = source.passphrases
    }

    /// The guest data of the image that `header` describes; nil where it is not encrypted, or
    /// stays locked.
    mutating func unlock(
        _ header: Header, in file: HostFile, isWritable: Bool
    ) throws(ImageError) -> EncryptedData? {
        if header.encryptionMethod == 0 { return nil }
        if header.encryptionMethod == 1, isWritable {
            throw ImageError(.encryption(.writingLegacyAES), file: file.name)
        }
        if source.opensLocked { return nil }
        defer { encryptedCount += 1 }
        if header.encryptionMethod == 1 { return try unlockAES(in: file) }
        return try unlockLUKS(header, in: file, isWritable: isWritable)
    }

    private mutating func unlockLUKS(
        _ header: Header, in file: HostFile, isWritable: Bool
    ) throws(ImageError) -> EncryptedData? {
        guard let area = header.encryption else { return nil }
        // Judged before anybody is asked for a passphrase.
        let luks = try LUKSVolume.header(of: header, in: file.device)
        func key(_ passphrase: Passphrase) throws(ImageError) -> SecretBytes? {
            for candidate in passphrase.candidates {
                let key = try LUKSVolume.key(
                    of: luks, at: area.offset, in: file, passphrase: candidate)
                if let key { return key }
            }
            return nil
        }
        let isFirst = passphrases.isEmpty
        var found: SecretBytes?
        for passphrase in try ordered(for: file) where found == nil {
            found = try key(passphrase)
        }
        // What was typed for a file above need not be this one's.
        if found == nil, !isFirst, source.passphrases.isEmpty,
            let asked = try source.question?(file.name)
        {
            passphrases.append(asked)
            found = try key(asked)
        }
        guard let found else { throw ImageError(.encryption(.wrongPassphrase), file: file.name) }
        return EncryptedData(
            try keyed(luks.suite, found.bytes, of: file), .host, isWritable: isWritable)
    }

    /// Legacy AES: the passphrase is the key, cut or filled up with zeros to 16 bytes; nothing
    /// tells whether it is right (specification, "Encryption", crypt_method 1).
    private mutating func unlockAES(in file: HostFile) throws(ImageError) -> EncryptedData? {
        guard let passphrase = try ordered(for: file).first?.withoutNewline else { return nil }
        let key = SecretBytes(count: 16) { key in
            key.initializeMemory(as: UInt8.self, repeating: 0)
            key.copyMemory(
                from: UnsafeRawBufferPointer(rebasing: passphrase[..<min(16, passphrase.count)]))
        }
        let suite = CipherSuite(cipher: .aes128, mode: .cbc, ivGenerator: .plain64)
        return EncryptedData(
            try keyed(suite, key.bytes, of: file), .guest, isWritable: false)
    }

    private func keyed(
        _ suite: CipherSuite, _ key: UnsafeRawBufferPointer, of file: HostFile
    ) throws(ImageError) -> SectorCipher {
        do throws(EncryptionError) {
            return try SectorCipher(suite, key: key)
        } catch {
            throw ImageError(.encryption(error), file: file.name)
        }
    }

    /// What to try on the next encrypted file: the passphrase that has its place first.
    private mutating func ordered(for file: HostFile) throws(ImageError) -> [Passphrase] {
        if passphrases.isEmpty {
            guard let asked = try source.question?(file.name) else {
                throw ImageError(.encryption(.passphraseNeeded), file: file.name)
            }
            passphrases.append(asked)
        }
        let first = min(encryptedCount, passphrases.count - 1)
        return [passphrases[first]]
            + passphrases.indices.filter { $0 != first }.map {
                passphrases[$0]
            }
    }
}
