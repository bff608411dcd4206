extension ImageAudit {
    /// How guest data is encrypted, and what it costs to try a passphrase.
    public struct Encryption: Sendable {
        /// One active key slot.
        public struct KeySlot: Sendable, Equatable {
            /// 0 to 7.
            public var number: Int
            /// Rounds of PBKDF2.
            public var iterations: UInt32
            /// Seconds that the rounds take on this machine; nil where that could not be measured.
            public var seconds: Double?
        }

        /// Nil for the legacy AES encryption, which derives nothing.
        public var luks: LUKSHeader?
        /// The active key slots.
        public var keySlots: [KeySlot] = []
        /// Seconds that a wrong passphrase takes, which is tried on every slot.
        public var seconds: Double?
    }

    mutating func judgeEncryption(_ device: FileDevice) throws(ImageError) {
        guard header.encryptionMethod != 0 else { return }
        var found = Encryption()
        defer { encryption = found }
        if header.encryptionMethod == 1 {
            warnings.append("has the legacy AES encryption, which is only read and proves nothing")
        }
        guard let area = header.encryption else { return }
        tables.luks = area.byteCount
        do throws(ImageError) {
            let luks = try LUKSVolume.header(of: header, in: device)
            found.luks = luks
            found.keySlots = luks.keySlots.enumerated().filter(\.element.isActive).map {
                Encryption.KeySlot(number: $0, iterations: $1.iterations)
            }
            if found.keySlots.isEmpty { refusals.append(EncryptionError.noKeySlot.description) }
            try weigh(&found, luks)
        } catch { try refuse(error) }
    }

    /// Measures this machine, and judges the rounds as opening does.
    private mutating func weigh(
        _ encryption: inout Encryption, _ luks: LUKSHeader
    ) throws(ImageError) {
        do throws(EncryptionError) {
            let derivation = try KeyDerivation(luks.hash)
            let byteCount = luks.suite.keyByteCount
            let rate = try derivation.iterationsPerSecond(byteCount: byteCount)
            let digestByteCount = LUKSHeader.keyDigestByteCount
            let digestSeconds =
                Double(luks.keyDigestIterations)
                / (try derivation.iterationsPerSecond(byteCount: digestByteCount))
            var total = 0.0
            for index in encryption.keySlots.indices {
                let seconds = Double(encryption.keySlots[index].iterations) / rate
                encryption.keySlots[index].seconds = seconds
                total += seconds + digestSeconds
            }
            encryption.seconds = total
            try derivation.judge(
                luks.keyDigestIterations, byteCount: digestByteCount, of: "the LUKS key digest")
            for slot in encryption.keySlots {
                try derivation.judge(
                    slot.iterations, byteCount: byteCount, of: "LUKS key slot \(slot.number)")
            }
        } catch {
            refusals.append(error.description)
        }
    }
}
