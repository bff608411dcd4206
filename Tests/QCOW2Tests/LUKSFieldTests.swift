import QCOW2
import TestSupport
import Testing

/// What a LUKS header says, field by field, and how far each may go.
@Suite("Fields of LUKS headers")
struct LUKSFieldTests {
    func parse(
        _ bytes: [UInt8], areaByteCount: UInt64 = LUKSHeaderTests.areaByteCount
    ) throws(FormatError) -> LUKSHeader {
        try bytes.withUnsafeBytes { raw in
            Result { () throws(FormatError) in
                try LUKSHeader.parse(raw, areaByteCount: areaByteCount)
            }
        }.get()
    }

    func changed(_ change: (inout [UInt8]) -> Void) -> [UInt8] {
        var bytes = LUKSHeaderTests.header()
        change(&bytes)
        return bytes
    }

    @Test("Every field is where it belongs")
    func fields() throws {
        let header = try parse(
            changed {
                for offset in 112..<164 { $0[offset] = UInt8(offset) }
                for offset in 216..<248 { $0[offset] = UInt8(offset) }
                $0.put(UInt32(0x1234), at: 308)
            })
        #expect(header.suite == CipherSuite(cipher: .aes256, mode: .xts, ivGenerator: .plain64))
        #expect(header.hash == .sha256 && header.payloadOffset == 4040)
        #expect(header.keyDigest == Array(112..<132) && header.keyDigestSalt == Array(132..<164))
        #expect(header.keyDigestIterations == 1000)
        #expect(header.uuid == "01234567-89ab-cdef-0123-456789abcdef")
        #expect(header.keySlots.count == 8)
        let first = header.keySlots[0]
        #expect(first.isActive && first.iterations == 1000 && first.salt == Array(216..<248))
        #expect(first.keyMaterialOffset == 8 && first.stripes == 4000)
        let second = header.keySlots[1]
        #expect(!second.isActive && second.iterations == 0)
        #expect(second.keyMaterialOffset == 512 && header.keySlots[2].salt.count == 32)
        #expect(header.keySlots[7].keyMaterialOffset == 8 + 504 * 7)
    }

    @Test("The header has 592 bytes, in its area too")
    func length() {
        let bytes = LUKSHeaderTests.header()
        let free = changed { $0.put(UInt32(0xdead), at: 208) }
        #expect(throws: Never.self) { try parse(free, areaByteCount: 592) }
        #expect(throws: FormatError.truncated("LUKS header", needed: 592, found: 591)) {
            try parse(free, areaByteCount: 591)
        }
        #expect(throws: FormatError.truncated("LUKS header", needed: 592, found: 591)) {
            try parse(Array(bytes.dropLast()))
        }
    }

    @Test("Key material lies behind the header and ends with the area")
    func keyMaterial() {
        // 4000 stripes of 64 bytes: 500 sectors.
        func expect(_ sector: UInt32, isFine: Bool) {
            let bytes = changed { $0.put(sector, at: 248) }
            #expect(((try? parse(bytes)) != nil) == isFine, "sector \(sector)")
        }
        expect(1, isFine: false)
        expect(2, isFine: true)
        expect(4040 - 500, isFine: true)
        expect(4040 - 499, isFine: false)
        // Only slots in use are looked at.
        #expect(throws: Never.self) { try parse(changed { $0.put(UInt32(1), at: 296) }) }
        #expect(throws: Never.self) { try parse(changed { $0.put(UInt32(1), at: 212) }) }
        #expect(throws: Never.self) { try parse(changed { $0.put(UInt32(1), at: 164) }) }
    }

    @Test("Texts end within their fields, and bytes that are no letters show as question marks")
    func texts() throws {
        let uuid = try parse(changed { $0.put([0x1f, 0x20, 0x7e, 0x7f, 0xff, 0], at: 168) }).uuid
        #expect(uuid == "? ~??")
        #expect(
            throws: FormatError.inconsistent("the LUKS header's UUID does not end within its field")
        ) { try parse(changed { $0.put([UInt8](repeating: 0x61, count: 40), at: 168) }) }
        #expect(throws: Never.self) {
            try parse(changed { $0.put([UInt8](repeating: 0x61, count: 39), at: 168) })
        }
    }

    @Test(
        "Ciphers, modes and generators by their names, with keys of their length",
        arguments: [
            ("aes", "xts-plain64", 32, .aes128, .xts, .plain64, nil),
            ("aes", "cbc-essiv:sha256", 32, .aes256, .cbc, .essiv, .sha256),
            ("aes", "cbc-plain", 16, .aes128, .cbc, .plain, nil),
            ("serpent", "ecb-plain64", 32, .serpent256, .ecb, .plain64, nil),
            ("twofish", "ctr-plain64", 16, .twofish128, .ctr, .plain64, nil),
            ("cast5", "cbc-plain64", 16, .cast5, .cbc, .plain64, nil),
            ("aes", "cbc-plain64:sha1", 16, .aes128, .cbc, .plain64, .sha1),
        ]
            as [(
                String, String, UInt32, CipherAlgorithm, CipherMode, IVGenerator, HashAlgorithm?
            )])
    func suites(
        name: String, specification: String, keyByteCount: UInt32, cipher: CipherAlgorithm,
        mode: CipherMode, generator: IVGenerator, hash: HashAlgorithm?
    ) throws {
        let header = try parse(
            changed {
                $0.put(Array(name.utf8) + [0], at: 8)
                $0.put(Array(specification.utf8) + [0], at: 40)
                $0.put(keyByteCount, at: 108)
            })
        #expect(
            header.suite
                == CipherSuite(cipher: cipher, mode: mode, ivGenerator: generator, ivHash: hash))
        #expect(header.suite.keyByteCount == Int(keyByteCount))
        #expect(header.suite.contradiction == nil)
    }

    @Test("Suites that cannot be")
    func contradictions() {
        func words(
            _ cipher: CipherAlgorithm, _ mode: CipherMode, _ generator: IVGenerator = .plain64,
            _ hash: HashAlgorithm? = nil
        ) -> String? {
            CipherSuite(cipher: cipher, mode: mode, ivGenerator: generator, ivHash: hash)
                .contradiction
        }
        #expect(words(.cast5, .xts)?.contains("the mode xts needs 16") == true)
        #expect(words(.cast5, .cbc) == nil)
        #expect(words(.aes192, .cbc)?.contains("no whole sectors") == true)
        #expect(words(.aes192, .xts) == nil)
        #expect(words(.aes256, .cbc, .essiv)?.contains("hash none") == true)
        #expect(words(.aes256, .cbc, .essiv, .sha1)?.contains("hash sha1") == true)
        #expect(words(.aes256, .cbc, .essiv, .md5) == nil)
        #expect(words(.cast5, .cbc, .essiv, .md5)?.contains("no essiv") == true)
        #expect(words(.serpent128, .cbc, .essiv, .sha256) == nil)
    }
}
