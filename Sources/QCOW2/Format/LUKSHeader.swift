/// The header of LUKS version 1: how guest data is encrypted, and eight slots with the key.
///
/// | offset | bytes | field                                              |
/// | 0      | 6     | magic `LUKS\xba\xbe`                               |
/// | 6      | 2     | version, 1                                         |
/// | 8      | 32    | cipher's name                                      |
/// | 40     | 32    | mode and IV generator                              |
/// | 72     | 32    | hash of PBKDF2 and of the anti-forensic splitter   |
/// | 104    | 4     | where encrypted data starts; without meaning here  |
/// | 108    | 4     | bytes of the key                                   |
/// | 112    | 20    | digest of the key                                  |
/// | 132    | 32    | its salt                                           |
/// | 164    | 4     | its rounds of PBKDF2                               |
/// | 168    | 40    | UUID                                               |
/// | 208    | 8×48  | key slots                                          |
///
/// Offsets of key material are sectors of 512 bytes from the start of the header (LUKS On-Disk
/// Format Specification 1.2.3, figures 1 and 2).
public struct LUKSHeader: Sendable, Hashable {
    /// The key, encrypted with what a passphrase is turned into.
    ///
    /// | offset | bytes | field                                  |
    /// | 0      | 4     | 0x00AC71F3 in use, 0x0000DEAD not      |
    /// | 4      | 4     | rounds of PBKDF2                       |
    /// | 8      | 32    | salt                                   |
    /// | 40     | 4     | where the key material is, in sectors  |
    /// | 44     | 4     | stripes of the splitter, 4000          |
    public struct KeySlot: Sendable, Hashable {
        /// Whether a passphrase opens the slot.
        public var isActive: Bool
        /// Rounds of PBKDF2.
        public var iterations: UInt32
        /// 32 bytes that go into PBKDF2.
        public var salt: [UInt8]
        /// Sectors of 512 bytes.
        public var keyMaterialOffset: UInt32
        /// Stripes of the anti-forensic splitter: the key material is so many times as long as the
        /// key.
        public var stripes: UInt32
    }

    /// Cipher, mode and IV generator of the payload.
    public var suite: CipherSuite
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    public var hash: HashAlgorithm
    /// Sectors of 512 bytes.
    public var payloadOffset: UInt32
    /// 20 bytes that PBKDF2 makes of the right key.
    public var keyDigest: [UInt8]
    /// 32 bytes that go into the digest of the key.
    public var keyDigestSalt: [UInt8]
    /// Rounds of PBKDF2 for the digest of the key.
    public var keyDigestIterations: UInt32
    /// The volume's UUID, as text.
    public var uuid: String
    /// All eight slots, active or not.
    public var keySlots: [KeySlot]

    package static let byteCount = 592
    static let magic: [UInt8] = [0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe]
    static let keyDigestByteCount = 20
    static let saltByteCount = 32
    static let keySlotCount = 8
    static let sectorByteCount: UInt64 = 512
    private static let active: UInt32 = 0x00ac_71f3
    private static let inactive: UInt32 = 0x0000_dead

    /// Bytes of the key material of a slot.
    static func keyMaterialByteCount(keyByteCount: Int) -> Int {
        keyByteCount * Int(Limits.luksStripes)
    }

    /// The slots whose key material may be read.
    var activeKeySlots: [KeySlot] { keySlots.filter(\.isActive) }
}

// MARK: - Parsing

extension LUKSHeader {
    /// Parses the start of the area that the header extension points to.
    /// - Parameter areaByteCount: bytes of the whole area, in which all key material must lie.
    package static func parse(
        _ bytes: UnsafeRawBufferPointer, areaByteCount: UInt64
    ) throws(FormatError) -> LUKSHeader {
        guard bytes.count >= byteCount, areaByteCount >= UInt64(byteCount) else {
            throw .truncated(
                "LUKS header", needed: UInt64(byteCount),
                found: min(UInt64(bytes.count), areaByteCount))
        }
        guard bytes[..<6].elementsEqual(magic) else {
            throw .inconsistent("there is no LUKS header where the header extension points to")
        }
        let version: UInt16 = bytes.bigEndian(at: 6) ?? 0
        guard version == 1 else {
            throw .outOfRange("LUKS version", value: UInt64(version), allowed: "1")
        }
        let header = try LUKSHeader(bytes)
        for (index, slot) in header.keySlots.enumerated() where slot.isActive {
            try header.check(slot, index, areaByteCount: areaByteCount)
        }
        return header
    }

    /// The fields; `bytes` are enough.
    private init(_ bytes: UnsafeRawBufferPointer) throws(FormatError) {
        func u32(_ offset: Int) -> UInt32 { bytes.bigEndian(at: offset) ?? 0 }
        let name = try Self.text(bytes[8..<40], "cipher")
        let specification = try Self.text(bytes[40..<72], "cipher mode")
        let hashName = try Self.text(bytes[72..<104], "hash")
        suite = try CipherSuite(
            name: name, specification: specification, keyByteCount: Int(u32(108)))
        hash = try CipherSuite.known(HashAlgorithm.self, hashName, "hash")
        payloadOffset = u32(104)
        keyDigest = Array(bytes[112..<132])
        keyDigestSalt = Array(bytes[132..<164])
        keyDigestIterations = u32(164)
        guard keyDigestIterations > 0 else {
            throw .outOfRange("LUKS key digest's rounds", value: 0, allowed: "1 or more")
        }
        uuid = try Self.text(bytes[168..<208], "UUID")
        keySlots = []
        for index in 0..<Self.keySlotCount {
            keySlots.append(try Self.keySlot(bytes, at: 208 + index * 48, index))
        }
    }

    private static func keySlot(
        _ bytes: UnsafeRawBufferPointer, at offset: Int, _ index: Int
    ) throws(FormatError) -> KeySlot {
        let state: UInt32 = bytes.bigEndian(at: offset) ?? 0
        guard state == active || state == inactive else {
            throw .inconsistent(
                "LUKS key slot \(index) is neither in use nor free (\(hex(UInt64(state))))")
        }
        return KeySlot(
            isActive: state == active, iterations: bytes.bigEndian(at: offset + 4) ?? 0,
            salt: Array(bytes[offset + 8..<offset + 40]),
            keyMaterialOffset: bytes.bigEndian(at: offset + 40) ?? 0,
            stripes: bytes.bigEndian(at: offset + 44) ?? 0)
    }

    private func check(
        _ slot: KeySlot, _ index: Int, areaByteCount: UInt64
    ) throws(FormatError) {
        guard slot.iterations > 0 else {
            throw .outOfRange("LUKS key slot \(index)'s rounds", value: 0, allowed: "1 or more")
        }
        guard slot.stripes == Limits.luksStripes else {
            throw .outOfRange(
                "LUKS key slot \(index)'s stripes", value: UInt64(slot.stripes),
                allowed: "\(Limits.luksStripes)")
        }
        let start = UInt64(slot.keyMaterialOffset) &* Self.sectorByteCount  // 41 bits
        let material = UInt64(Self.keyMaterialByteCount(keyByteCount: suite.keyByteCount))
        guard start >= UInt64(Self.byteCount), start &+ material <= areaByteCount else {
            throw .inconsistent(
                "the key material of LUKS key slot \(index) at \(hex(start)) lies outside of "
                    + "the LUKS header's area (\(areaByteCount) bytes)")
        }
    }

    /// Text that fills a field up with zeros, printable as it is.
    private static func text(
        _ field: Slice<UnsafeRawBufferPointer>, _ what: String
    ) throws(FormatError) -> String {
        guard field.contains(0) else {
            throw .inconsistent("the LUKS header's \(what) does not end within its field")
        }
        let characters = field.prefix { $0 != 0 }.map { byte in
            (0x20..<0x7f).contains(byte) ? Character(Unicode.Scalar(byte)) : "?"
        }
        return String(characters)
    }
}

// MARK: - Encoding

extension LUKSHeader {
    /// The bytes of the header, without key material.
    func encoded() -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Self.byteCount)
        bytes.replace(at: 0, with: Self.magic)
        bytes.storeBigEndian(UInt16(1), at: 6)
        bytes.replace(at: 8, with: Array(suite.cipher.family.rawValue.utf8))
        bytes.replace(at: 40, with: Array(suite.specification.utf8))
        bytes.replace(at: 72, with: Array(hash.rawValue.utf8))
        bytes.storeBigEndian(payloadOffset, at: 104)
        bytes.storeBigEndian(UInt32(clamping: suite.keyByteCount), at: 108)
        bytes.replace(at: 112, with: keyDigest)
        bytes.replace(at: 132, with: keyDigestSalt)
        bytes.storeBigEndian(keyDigestIterations, at: 164)
        bytes.replace(at: 168, with: Array(uuid.utf8))
        for (index, slot) in keySlots.enumerated() {
            let offset = 208 + index * 48
            bytes.storeBigEndian(slot.isActive ? Self.active : Self.inactive, at: offset)
            bytes.storeBigEndian(slot.iterations, at: offset + 4)
            bytes.replace(at: offset + 8, with: slot.salt)
            bytes.storeBigEndian(slot.keyMaterialOffset, at: offset + 40)
            bytes.storeBigEndian(slot.stripes, at: offset + 44)
        }
        return bytes
    }
}

extension Array where Element == UInt8 {
    /// Stores `bytes` at `offset`; the caller has made the room.
    fileprivate mutating func replace(at offset: Int, with bytes: [UInt8]) {
        replaceSubrange(offset..<offset + bytes.count, with: bytes)
    }
}

/// The full disk encryption header extension: where the LUKS header and its key material are.
public struct EncryptionExtension: Sendable, Hashable {
    /// Host offset.
    public var offset: UInt64
    /// Bytes of the LUKS header with all key material.
    public var byteCount: UInt64

    init(offset: UInt64, byteCount: UInt64) {
        self.offset = offset
        self.byteCount = byteCount
    }

    init(_ data: [UInt8], clusterByteCount: UInt64) throws(FormatError) {
        guard data.count == 16 else {
            throw .outOfRange(
                "LUKS header extension's length", value: UInt64(data.count), allowed: "16")
        }
        (offset, byteCount) = data.withUnsafeBytes {
            ($0.bigEndian(at: 0, as: UInt64.self) ?? 0, $0.bigEndian(at: 8, as: UInt64.self) ?? 0)
        }
        guard offset & (clusterByteCount &- 1) == 0 else {
            throw .misaligned("LUKS header", offset: offset, alignment: clusterByteCount)
        }
        guard byteCount <= Limits.luksAreaByteCount else {
            throw .tooLarge("LUKS header's area", value: byteCount, limit: Limits.luksAreaByteCount)
        }
        guard offset >= clusterByteCount, offset <= Limits.hostOffset &- byteCount else {
            throw .outOfRange(
                "offset of the LUKS header", value: offset,
                allowed: "\(clusterByteCount) to \(Limits.hostOffset)")
        }
    }

    /// The extension as it is stored.
    var data: [UInt8] {
        var data = [UInt8](repeating: 0, count: 16)
        data.storeBigEndian(offset, at: 0)
        data.storeBigEndian(byteCount, at: 8)
        return data
    }
}
