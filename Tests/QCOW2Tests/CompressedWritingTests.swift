import QCOW2
import TestSupport
import Testing

/// Compressed clusters that we write, judged by the tests' own reader.
@Suite("Compressed writing")
struct CompressedWritingTests {
    /// Clusters of every kind: text that shrinks to about half or much less, noise, zeros.
    private func clusters(_ count: Int, _ size: Int) -> [[UInt8]] {
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        return (0..<count).map { index in
            switch index % 7 {
            case 3: return [UInt8](repeating: 0, count: size)
            case 5: return (0..<size).map { _ in UInt8(truncatingIfNeeded: random.next()) }
            case 6: return [UInt8](repeating: UInt8(index & 255), count: size)
            default: return (0..<size).map { _ in UInt8(truncatingIfNeeded: random.next()) & 0x0f }
            }
        }
    }

    @Test(
        "Streams share and cross host clusters, every touched one is counted, and all reads back",
        arguments: [9, 12, 16], [UInt8(0), 1])
    func packs(clusterBits: Int, type: UInt8) throws {
        var builder = ImageBuilder(byteCount: (40 << clusterBits) - 512, clusterBits: clusterBits)
        builder.compressionType = type
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        let size = 1 << clusterBits
        let written = clusters(40, size)
        let writer = try CompressedWriter(image, threadCount: 3)
        for (index, cluster) in written.enumerated() {
            let count = min(size, builder.byteCount - index * size)
            try cluster[..<count].withUnsafeBytes {
                try writer.write($0, at: UInt64(index * size))
            }
        }
        try writer.finish()
        try image.close()
        let expected = Array(written.joined())[..<builder.byteCount]
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            let audit = reader.audit()
            #expect(audit.faults == [] && audit.leakCount == 0)
            #expect(try reader.read(0..<reader.byteCount)[...] == expected)
            var ends: [Int] = []
            var kinds = (streams: 0, plain: 0, holes: 0, shared: 0)
            for cluster in 0..<40 {
                let raw = try reader.rawEntry(forGuestCluster: cluster, in: reader.active)
                switch try reader.entry(raw) {
                case .compressed(let start, let count):
                    kinds.streams += 1
                    ends.append(start)
                    if start % size != 0 { kinds.shared += 1 }
                    if start / size != (start + count - 1) / size { kinds.shared += 1 }
                case .normal: kinds.plain += 1
                default: kinds.holes += 1
                }
            }
            // Noise is stored as it is, zeros not at all, and streams lie in the order they came.
            #expect(kinds.plain >= 5 && kinds.holes >= 5 && kinds.streams >= 20)
            #expect(kinds.shared > 10)
            #expect(ends == ends.sorted())
        }
    }

    @Test("With 1-bit counts every stream has a host cluster of its own")
    func narrowCounts() throws {
        let builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 12, refcountOrder: 0)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        let writer = try CompressedWriter(image, threadCount: 1)
        for index in 0..<8 {
            try [UInt8](repeating: UInt8(index + 1), count: 4096).withUnsafeBytes {
                try writer.write($0, at: UInt64(index * 4096))
            }
        }
        try writer.finish()
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let audit = try ReferenceReader(bytes).audit()
            #expect(audit.faults == [] && audit.leakCount == 0)
        }
    }

    @Test("Trap 44: the place behind the last stream is forgotten with its cluster")
    func cursorDies() throws {
        let builder = ImageBuilder(byteCount: 1.MiB)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        func compress(_ byte: UInt8, at cluster: Int) throws {
            let writer = try CompressedWriter(image, threadCount: 1)
            try [UInt8](repeating: byte, count: 65536).withUnsafeBytes {
                try writer.write($0, at: UInt64(cluster * 65536))
            }
            try writer.finish()
        }
        try compress(0xA1, at: 0)
        #expect(try image.bytes(0..<100).allSatisfy { $0 == 0xA1 })
        try image.discard(0..<65536)
        try image.flush()
        try image.write([UInt8](repeating: 0xB2, count: 65536), at: 65536)
        try compress(0xC3, at: 2)
        #expect(try image.bytes(65536..<131072).allSatisfy { $0 == 0xB2 })
        #expect(try image.bytes(131072..<196608).allSatisfy { $0 == 0xC3 })
        try image.close()
        try device.bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            let audit = reader.audit()
            #expect(audit.faults == [] && audit.leakCount == 0)
            #expect(try reader.read(65536..<65636).allSatisfy { $0 == 0xB2 })
        }
    }

    @Test("A stream in another's former place is not read from memory of the other")
    func forgets() throws {
        let builder = ImageBuilder(byteCount: 1.MiB)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        for byte in UInt8(1)...6 {
            let writer = try CompressedWriter(image, threadCount: 1)
            try [UInt8](repeating: byte, count: 65536).withUnsafeBytes {
                try writer.write($0, at: 0)
            }
            try writer.finish()
            #expect(try image.bytes(0..<4096).allSatisfy { $0 == byte })
            try image.discard(0..<65536)
            try image.flush()
        }
        try image.close()
    }

    @Test("An encrypted image gets no compressed clusters, nor one that is read-only")
    func refuses() throws {
        let image = try Image.open(
            bytes: ImageBuilder(byteCount: 1.MiB).build(), options: .readOnly)
        #expect(throws: ImageError.self) { try CompressedWriter(image, threadCount: 1) }
        try image.close()
    }
}
