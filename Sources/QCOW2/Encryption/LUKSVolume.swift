/// The key of a LUKS image: found with a passphrase, or new.
enum LUKSVolume {
    // MARK: Opening

    /// Reads the LUKS header of the image in `file`.
    /// - Throws: `.malformed`.
    static func header(
        of header: Header, in device: any BlockDevice
    ) throws(ImageError) -> LUKSHeader {
        guard let area = header.encryption else {
            throw ImageError(.encryption(.noKeySlot), file: device.name)
        }
        let bytes = try Header.read(LUKSHeader.byteCount, at: area.offset, of: device)
        do throws(FormatError) {
            return try bytes.withRawBytes { bytes throws(FormatError) in
                try LUKSHeader.parse(bytes, areaByteCount: area.byteCount)
            }
        } catch {
            throw ImageError(.malformed(error), file: device.name)
        }
    }

    /// The key, by the first active slot that `passphrase` opens; nil where it opens none.
    static func key(
        of header: LUKSHeader, at areaOffset: UInt64, in file: HostFile,
        passphrase: UnsafeRawBufferPointer
    ) throws(ImageError) -> SecretBytes? {
        guard header.keySlots.contains(where: \.isActive) else {
            throw ImageError(.encryption(.noKeySlot), file: file.name)
        }
        for (number, slot) in header.keySlots.enumerated() where slot.isActive {
            let material = try readMaterial(of: slot, header, areaOffset, file)
            do throws(EncryptionError) {
                let key = try key(in: slot, number, of: header, material, passphrase: passphrase)
                if let key { return key }
            } catch {
                throw ImageError(.encryption(error), file: file.name)
            }
        }
        return nil
    }

    private static func readMaterial(
        of slot: LUKSHeader.KeySlot, _ header: LUKSHeader, _ areaOffset: UInt64, _ file: HostFile
    ) throws(ImageError) -> SecretBytes {
        let byteCount = LUKSHeader.keyMaterialByteCount(keyByteCount: header.suite.keyByteCount)
        let start = UInt64(slot.keyMaterialOffset) &* LUKSHeader.sectorByteCount
        return try SecretBytes(count: byteCount) { buffer throws(ImageError) in
            // Both were judged: the material lies inside of the area, which ends below 2^56.
            try file.read(into: buffer, at: areaOffset &+ start)
        }
    }

    /// The key in a slot; nil where the passphrase does not open it.
    /// - Parameter material: what the slot stores; it is decrypted in place.
    private static func key(
        in slot: LUKSHeader.KeySlot, _ number: Int, of header: LUKSHeader,
        _ material: SecretBytes, passphrase: UnsafeRawBufferPointer
    ) throws(EncryptionError) -> SecretBytes? {
        let byteCount = header.suite.keyByteCount
        let derivation = try KeyDerivation(header.hash)
        try derivation.judge(
            slot.iterations, byteCount: byteCount, of: "LUKS key slot \(number)")
        try derivation.judge(
            header.keyDigestIterations, byteCount: LUKSHeader.keyDigestByteCount,
            of: "the LUKS key digest")
        let slotKey = try derivation.key(
            from: passphrase, salt: slot.salt, iterations: slot.iterations, byteCount: byteCount)
        let cipher = try SectorCipher(header.suite, key: slotKey.bytes)
        defer { cipher.close() }
        try cipher.apply(.decrypt, from: material.bytes, to: material.room, sector: 0)
        let splitter = try AntiForensicSplitter(header.hash, stripeCount: Limits.luksStripes)
        let key = try splitter.merge(material.bytes, keyByteCount: byteCount)
        let digest = try derivation.key(
            from: key.bytes, salt: header.keyDigestSalt, iterations: header.keyDigestIterations,
            byteCount: LUKSHeader.keyDigestByteCount)
        return digest.bytes.elementsEqual(header.keyDigest) ? key : nil
    }

    // MARK: Making

    /// A new header with one key slot, and what that slot stores.
    struct New {
        let header: LUKSHeader
        let material: SecretBytes
        /// Sectors from the start of the area.
        var materialOffset: UInt32 { header.keySlots[0].keyMaterialOffset }
    }

    /// Bytes of the area of a new image: the header, and room for eight slots.
    static func areaByteCount(of suite: CipherSuite) -> UInt64 {
        UInt64(payloadOffset(of: suite)) * LUKSHeader.sectorByteCount
    }

    /// Slots start at multiples of 4 KiB.
    private static let alignment: UInt32 = 8

    private static func slotSectorCount(of suite: CipherSuite) -> UInt32 {
        let byteCount = LUKSHeader.keyMaterialByteCount(keyByteCount: suite.keyByteCount)
        let sectors = UInt32((byteCount + 511) / 512)
        return (sectors + alignment - 1) / alignment * alignment
    }

    private static func payloadOffset(of suite: CipherSuite) -> UInt32 {
        alignment + slotSectorCount(of: suite) * UInt32(LUKSHeader.keySlotCount)
    }

    /// Draws a key, and hides it behind the passphrase.
    static func make(_ options: LUKSOptions) throws(EncryptionError) -> New {
        let suite = options.suite
        let byteCount = suite.keyByteCount
        let key = try SecretBytes(count: byteCount) { key throws(EncryptionError) in
            try RandomBytes.fill(key)
        }
        let derivation = try KeyDerivation(options.hash)
        let rounds = try derivation.iterationsPerSecond(byteCount: byteCount)
        let iterations = Self.iterations(rounds * Double(options.milliseconds) / 1000)
        let salt = try RandomBytes.make(LUKSHeader.saltByteCount)
        let slotKey = try derivation.key(
            from: options.passphrase.withoutNewline, salt: salt, iterations: iterations,
            byteCount: byteCount)
        let material = try hide(key, behind: slotKey, options)

        // As QEMU has it: an eighth of the slot's time for the digest.
        let digestSalt = try RandomBytes.make(LUKSHeader.saltByteCount)
        let digestIterations = Self.iterations(Double(iterations) / 8)
        let digest = try derivation.key(
            from: key.bytes, salt: digestSalt, iterations: digestIterations,
            byteCount: LUKSHeader.keyDigestByteCount)
        var slots = (0..<UInt32(LUKSHeader.keySlotCount)).map { number in
            LUKSHeader.KeySlot(
                isActive: false, iterations: 0,
                salt: [UInt8](repeating: 0, count: LUKSHeader.saltByteCount),
                keyMaterialOffset: alignment + number * slotSectorCount(of: suite),
                stripes: Limits.luksStripes)
        }
        slots[0].isActive = true
        slots[0].iterations = iterations
        slots[0].salt = salt
        let header = LUKSHeader(
            suite: suite, hash: options.hash, payloadOffset: payloadOffset(of: suite),
            keyDigest: Array(digest.bytes), keyDigestSalt: digestSalt,
            keyDigestIterations: digestIterations, uuid: try makeUUID(), keySlots: slots)
        return New(header: header, material: material)
    }

    private static func hide(
        _ key: SecretBytes, behind slotKey: SecretBytes, _ options: LUKSOptions
    ) throws(EncryptionError) -> SecretBytes {
        let splitter = try AntiForensicSplitter(options.hash, stripeCount: Limits.luksStripes)
        let cipher = try SectorCipher(options.suite, key: slotKey.bytes)
        defer { cipher.close() }
        let byteCount = LUKSHeader.keyMaterialByteCount(keyByteCount: key.count)
        return try SecretBytes(count: byteCount) { material throws(EncryptionError) in
            try splitter.split(key.bytes, into: material)
            try cipher.apply(
                .encrypt, from: UnsafeRawBufferPointer(material), to: material, sector: 0)
        }
    }

    /// No passphrase is derived with fewer than a thousand rounds.
    private static func iterations(_ wanted: Double) -> UInt32 {
        UInt32(max(1000, min(wanted, Double(Int32.max))))
    }

    /// A random UUID (RFC 9562, version 4).
    private static func makeUUID() throws(EncryptionError) -> String {
        var bytes = try RandomBytes.make(16)
        bytes[6] = bytes[6] & 0x0f | 0x40
        bytes[8] = bytes[8] & 0x3f | 0x80
        var text = ""
        for (index, byte) in bytes.enumerated() {
            if [4, 6, 8, 10].contains(index) { text += "-" }
            text += (byte < 16 ? "0" : "") + String(byte, radix: 16)
        }
        return text
    }
}
