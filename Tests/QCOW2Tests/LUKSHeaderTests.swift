import QCOW2
import TestSupport
import Testing

/// What a stranger may write into a LUKS header: it is refused with a sentence, at once.
@Suite("Hostile LUKS headers")
struct LUKSHeaderTests {
    /// A header of the commonest kind, with its first slot in use.
    static func header() -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 592)
        bytes.put([0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe, 0, 1], at: 0)
        bytes.put(Array("aes".utf8), at: 8)
        bytes.put(Array("xts-plain64".utf8), at: 40)
        bytes.put(Array("sha256".utf8), at: 72)
        bytes.put(UInt32(4040), at: 104)
        bytes.put(UInt32(64), at: 108)
        bytes.put(UInt32(1000), at: 164)
        bytes.put(Array("01234567-89ab-cdef-0123-456789abcdef".utf8), at: 168)
        for slot in 0..<8 {
            bytes.put(UInt32(slot == 0 ? 0x00ac_71f3 : 0xdead), at: 208 + slot * 48)
            bytes.put(UInt32(slot == 0 ? 1000 : 0), at: 212 + slot * 48)
            bytes.put(UInt32(8 + 504 * slot), at: 248 + slot * 48)
            bytes.put(UInt32(4000), at: 252 + slot * 48)
        }
        return bytes
    }

    static let areaByteCount: UInt64 = 4040 * 512

    /// An image with `luks` as its LUKS header.
    static func image(_ luks: [UInt8], areaByteCount: UInt64 = areaByteCount) -> [UInt8] {
        var builder = ImageBuilder(byteCount: 1.MiB)
        let area = builder.allocate(byteCount: Int(clamping: min(areaByteCount, 4 << 20)))
        var pointer: [UInt8] = []
        pointer.put(UInt64(area), at: 0)
        pointer.put(areaByteCount, at: 8)
        builder.extensions = [(0x0537_be77, pointer)]
        var bytes = builder.build()
        bytes.put(UInt32(2), at: 32)
        bytes.put(luks, at: Int(area))
        return bytes
    }

    /// Why an image with that header is not opened.
    private func refusal(of image: [UInt8]) -> ImageError.Kind? {
        let options = OpenOptions(
            access: .readOnly, passphrases: PassphraseSource([Passphrase("x")]))
        do throws(ImageError) {
            try Image.open(bytes: image, options: options).close()
            return nil
        } catch {
            #expect(!error.description.contains("\n") && !error.description.hasSuffix("."))
            return error.kind
        }
    }

    private func isMalformed(_ image: [UInt8]) -> Bool {
        if case .malformed = refusal(of: image) { return true }
        return false
    }

    @Test("A header with nothing wrong has only a passphrase that does not fit")
    func sound() {
        #expect(refusal(of: Self.image(Self.header())) == .encryption(.wrongPassphrase))
    }

    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let change: @Sendable (inout [UInt8]) -> Void

        init(_ description: String, _ change: @escaping @Sendable (inout [UInt8]) -> Void) {
            testDescription = description
            self.change = change
        }
    }

    @Test(
        "Fields that make no sense",
        arguments: [
            Case("no magic") { $0[0] = 0 },
            Case("version 2") { $0.put(UInt16(2), at: 6) },
            Case("a cipher that nobody knows") { $0.put(Array("rot13".utf8), at: 8) },
            Case("a cipher's name without an end") {
                $0.put([UInt8](repeating: 0x61, count: 32), at: 8)
            },
            Case("a cipher's name that moves the cursor") { $0.put([0x1b, 0x5b, 0x32], at: 8) },
            Case("a mode that nobody knows") { $0.put(Array("gcm-plain64".utf8), at: 40) },
            Case("a mode alone") { $0.put(Array("xts\0\0\0\0\0\0\0\0".utf8), at: 40) },
            Case("a generator that nobody knows") { $0.put(Array("xts-lmk\0\0\0\0".utf8), at: 40) },
            Case("essiv without a hash") { $0.put(Array("xts-essiv\0\0".utf8), at: 40) },
            Case("essiv with a hash of no key's length") {
                $0.put(Array("xts-essiv:sha1\0".utf8), at: 40)
            },
            Case("a hash that nobody knows") { $0.put(Array("crc32\0".utf8), at: 72) },
            Case("no key") { $0.put(UInt32(0), at: 108) },
            Case("a key of odd length") { $0.put(UInt32(63), at: 108) },
            Case("a key of four gigabytes") { $0.put(UInt32.max, at: 108) },
            Case("a digest of no rounds") { $0.put(UInt32(0), at: 164) },
            Case("a slot that is neither in use nor free") { $0.put(UInt32(1), at: 208) },
            Case("a slot of no rounds") { $0.put(UInt32(0), at: 212) },
            Case("a slot of no stripes") { $0.put(UInt32(0), at: 252) },
            Case("a slot of four thousand million stripes") { $0.put(UInt32.max, at: 252) },
            Case("key material in the header") { $0.put(UInt32(1), at: 248) },
            Case("key material behind the area") { $0.put(UInt32(4040), at: 248) },
            Case("key material that ends behind the area") { $0.put(UInt32(3600), at: 248) },
            Case("key material two terabytes away") { $0.put(UInt32.max, at: 248) },
            Case("key material that fills no whole sectors") {
                $0.put(Array("cbc-plain64".utf8), at: 40)
                $0.put(UInt32(24), at: 108)
            },
            Case("blocks of 8 bytes in XTS") {
                $0.put(Array("cast5".utf8), at: 8)
                $0.put(UInt32(32), at: 108)
            },
        ])
    func malformed(_ wrong: Case) {
        var luks = Self.header()
        wrong.change(&luks)
        #expect(isMalformed(Self.image(luks)), "\(wrong.testDescription)")
    }

    @Test(
        "Rounds that would take for ever are not begun",
        arguments: [UInt32.max, UInt32(Int32.max), 1 << 30])
    func endlessRounds(_ rounds: UInt32) {
        for offset in [212, 164] {
            var luks = Self.header()
            luks.put(rounds, at: offset)
            let start = ContinuousClock.now
            guard
                case .encryption(.tooManyRounds(rounds, _, let seconds)) =
                    refusal(of: Self.image(luks))
            else {
                Issue.record("\(rounds) rounds were accepted")
                continue
            }
            #expect(seconds > 10)
            #expect(ContinuousClock.now - start < .seconds(5))
        }
    }

    @Test("No slot in use")
    func noSlots() {
        var luks = Self.header()
        luks.put(UInt32(0xdead), at: 208)
        #expect(refusal(of: Self.image(luks)) == .encryption(.noKeySlot))
    }

    @Test("An area that is too short, too long, misaligned, or in the header's cluster")
    func area() {
        #expect(isMalformed(Self.image(Self.header(), areaByteCount: 512)))
        #expect(isMalformed(Self.image(Self.header(), areaByteCount: 4096)))
        #expect(isMalformed(Self.image(Self.header(), areaByteCount: 1 << 40)))
        let image = Self.image(Self.header())
        for offset: UInt64 in [0, 512, 0x50001, 1 << 62, .max] {
            var bytes = image
            // The extension's data follow the header and the extension's own eight bytes.
            bytes.put(offset, at: 120)
            #expect(isMalformed(bytes), "offset \(offset)")
        }
    }

    @Test("An area past the end of the file has no header in it")
    func pastTheEnd() {
        var bytes = Self.image(Self.header())
        bytes.put(UInt64(1) << 40, at: 120)
        #expect(isMalformed(bytes))
    }

    @Test("Any byte of the header may be anything, without harm")
    func anyByte() {
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        let rounds = [164..<168, 212..<216]
        for position in stride(from: 0, to: 592, by: 5)
        where !rounds.contains(where: { $0.contains(position) }) {
            var luks = Self.header()
            luks[position] = UInt8(truncatingIfNeeded: random.next())
            // Whatever comes of it: nothing opens, and nothing traps or hangs.
            #expect(refusal(of: Self.image(luks)) != nil, "byte \(position)")
        }
    }
}
