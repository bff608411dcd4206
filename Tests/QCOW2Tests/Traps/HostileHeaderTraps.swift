import QCOW2
import TestSupport
import Testing

/// Traps 14 to 16: numbers of an image that somebody chose to do harm.
@Suite("Traps of hostile numbers")
struct HostileHeaderTraps {
    /// An image that has everything an open has to read: extensions, snapshots, bitmaps.
    static func everything(clusterBits: Int = 16) -> [UInt8] {
        var builder = ImageBuilder(byteCount: 1 << (clusterBits + 4), clusterBits: clusterBits)
        builder.fill(0x11, guestCluster: 0)
        builder.snapshot("first")
        builder.fill(0x22, guestCluster: 1)
        builder.snapshot("second")
        builder.bitmap("bits")
        return builder.build()
    }

    @Test("Trap 14: whatever step of opening fails, it is told, and nothing is changed")
    func failingSteps() throws {
        let bytes = Self.everything(clusterBits: 9)
        for kind in [FaultyDevice.Kind.read, .flush] {
            for options in [OpenOptions(), .readOnly] {
                var call = 0
                while try failOpening(bytes, kind, call, options) { call += 1 }
                #expect(kind == .flush || call > 2, "only \(call) reads")
            }
        }
    }

    /// Opens over a device whose `call`-th call of a kind fails; false where it is not called.
    private func failOpening(
        _ bytes: [UInt8], _ kind: FaultyDevice.Kind, _ call: Int, _ options: OpenOptions
    ) throws -> Bool {
        let device = RecordingDevice(bytes, yielding: false)
        let faulty = FaultyDevice(device, FaultyDevice.Fault(kind, call: call))
        do throws(ImageError) {
            let image = try Image.open(faulty, options: options)
            let opened = faulty.failed
            try image.close()
            #expect(!opened, "\(kind) \(call) was told to nobody")
            return false
        } catch {
            guard case .system(.inputOutput, _) = error.kind else {
                Issue.record("\(error)")
                return false
            }
        }
        #expect(device.bytes == bytes)
        return true
    }

    @Test("Trap 14: an image that cannot be opened is let go of, lock and all")
    func letsGo() throws {
        let folder = try TemporaryDirectory()
        let bytes = Self.everything()
        let table = Int(bytes.number(at: 64, as: UInt64.self))
        for damage in [[0, 36], [1, 8], [1, 0]] {
            var broken = bytes
            let entry = table + damage[0] * 64
            broken.put(UInt32.max, at: entry + damage[1])
            let path = try folder.write(broken, to: "disk.qcow2")
            #expect(throws: ImageError.self) { try Image.open(path) }
            let device = try FileDevice(path: path, access: .readWrite)
            #expect(try ImageLock.take(.writer, on: device) == .held)
            device.close()
        }
    }

    /// A number that wraps round where a product or a sum has 32 or 64 bits.
    struct Number: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let put: @Sendable (inout [UInt8]) -> Void

        init(_ words: String, _ put: @escaping @Sendable (inout [UInt8]) -> Void) {
            (testDescription, self.put) = (words, put)
        }
    }

    private static let largeClusters = everything(clusterBits: 21)

    private static func snapshotTable(_ bytes: [UInt8]) -> Int {
        Int(bytes.number(at: 64, as: UInt64.self))
    }

    static let numbers: [Number] = {
        var numbers: [Number] = []
        for count in [0x800, 0x801, 0x8000_0000, .max] as [UInt32] {
            numbers.append(Number("\(count) clusters of refcount table") { $0.put(count, at: 56) })
        }
        for count in [0x2000_0000, 0x2000_0001, 0x8000_0000, .max] as [UInt32] {
            numbers.append(Number("\(count) L1 entries") { $0.put(count, at: 36) })
        }
        for count in [0x0001_0001, 0x0666_6667, 0x8000_0000, .max] as [UInt32] {
            numbers.append(Number("\(count) snapshots") { $0.put(count, at: 60) })
        }
        for field in [40, 48, 64] {
            numbers.append(
                Number("byte \(field) at the end of 64 bits") {
                    $0.put(UInt64.max << 21, at: field)
                })
        }
        for size in [1 << 62, 1 << 63, .max] as [UInt64] {
            numbers.append(Number("\(size) bytes") { $0.put(size, at: 24) })
        }
        for count in [0xFFFF_FFF8, 0xFFFF_FFFD, .max] as [UInt32] {
            numbers.append(Number("\(count) bytes of extension") { $0.put(count, at: 116) })
        }
        for count in [0x2000_0000, 0x2000_0001, .max] as [UInt32] {
            numbers.append(
                Number("\(count) L1 entries of a snapshot") {
                    $0.put(count, at: snapshotTable($0) + 8)
                })
        }
        numbers.append(
            Number("a snapshot's L1 table at the end of 64 bits") {
                $0.put(UInt64.max << 21, at: snapshotTable($0))
                $0.put(UInt32(4 << 20), at: snapshotTable($0) + 8)
            })
        numbers.append(
            Number("extra data of 2^32 - 1 bytes") {
                $0.put(UInt32.max, at: snapshotTable($0) + 36)
            })
        return numbers
    }()

    @Test("Trap 15: no product of counts and sizes wraps round", arguments: numbers)
    func products(_ number: Number) throws {
        var bytes = Self.largeClusters
        number.put(&bytes)
        let device = RecordingDevice(bytes, yielding: false)
        #expect { try Image.open(device) } throws: {
            ($0 as? ImageError)?.kind.isMalformed == true
        }
        #expect(device.bytes == bytes)
        // Where the number is of no use for reading, reading is as it was.
        if let image = try? Image.open(device, options: .readOnly) {
            #expect(try reads(image, 0..<512, 0x11))
            try image.close()
        }
        _ = try? ImageCheck(device)
    }

    @Test("Trap 15: the largest compressed descriptor is an error for its own bytes")
    func largestDescriptor() throws {
        for clusterBits in [9, 16, 21] {
            var builder = ImageBuilder(byteCount: 4 << clusterBits, clusterBits: clusterBits)
            builder.fill(0x11, guestCluster: 0)
            builder.setEntry(.max >> 1, guestCluster: 1)
            let image = try Image.open(bytes: builder.build(), options: .readOnly)
            #expect(throws: ImageError.self) {
                try image.bytes(1 << clusterBits..<2 << clusterBits)
            }
            #expect(try reads(image, 0..<1 << clusterBits, 0x11))
            try image.close()
        }
    }

    static let fields: [(offset: Int, byteCount: Int)] = [
        (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4),
        (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1), (112, 4), (116, 4),
    ]

    @Test("Trap 16: a field that is all zeros or all ones divides nothing and reserves nothing")
    func extremeFields() throws {
        let bytes = Self.everything(clusterBits: 12)
        var refused = 0
        for (offset, count) in Self.fields {
            for pattern in [0x00, 0xFF, 0x80, 0x01] as [UInt8] {
                var changed = bytes
                changed.put([UInt8](repeating: pattern, count: count), at: offset)
                for kind in refusals(of: changed) where kind != nil { refused += 1 }
                use(changed)
            }
        }
        #expect(refused > 100, "\(refused) refusals")
    }

    @Test("Trap 16: headers of nothing but zeros or ones behind the version are refused")
    func extremeHeaders() {
        for version in [UInt32(2), 3] {
            for pattern in [0x00, 0xFF] as [UInt8] {
                var bytes = [UInt8](repeating: pattern, count: 65536)
                bytes.put(UInt32(0x5146_49fb), at: 0)
                bytes.put(version, at: 4)
                for refusal in refusals(of: bytes) { #expect(refusal?.isMalformed == true) }
                // With a cluster size to get past the first look.
                bytes.put(UInt32(16), at: 20)
                for refusal in refusals(of: bytes) { #expect(refusal?.isMalformed == true) }
            }
        }
    }

    /// Whatever opens is read, written and closed: an answer is all that is asked for.
    private func use(_ bytes: [UInt8]) {
        guard let image = try? Image.open(bytes: bytes) else { return }
        let end = Int(clamping: image.size)
        for start in [0, max(end - 512, 0)] where start + 512 <= end {
            _ = try? image.bytes(start..<start + 512)
            try? image.write([1], at: start)
            try? image.discard(UInt64(start)..<UInt64(start + 512))
        }
        try? image.close()
    }
}
