import QCOW2
import TestSupport
import Testing

/// What is kept of a header that breaks the rules.
@Suite("A damaged header")
struct LenientHeaderTests {
    private func header(
        clusterBits: Int = 16, _ change: (inout [UInt8]) -> Void
    ) throws -> Header {
        var bytes = ImageBuilder(byteCount: 1.MiB, clusterBits: clusterBits).build()
        change(&bytes)
        return try #require(bytes.withUnsafeBytes { Header.lenient($0) })
    }

    @Test("Sizes are cut down to their limits, and no further")
    func sizes() throws {
        for excess in [0, 1] as [UInt64] {
            let header = try header {
                $0.put(Limits.virtualByteCount + excess, at: 24)
                $0.put(UInt32((32 << 20) / 8 + excess), at: 36)
                $0.put(UInt32((8 << 20) / 65536 + excess), at: 56)
                $0.put(UInt32(65536 + excess), at: 60)
            }
            #expect(header.size == Limits.virtualByteCount)
            #expect(header.l1EntryCount == 4 << 20 && header.refcountTableClusterCount == 128)
            #expect(header.snapshotCount == 65536)
        }
    }

    @Test("A table behind every file has no entries", arguments: [0, 1] as [UInt64])
    func offsets(before: UInt64) throws {
        let header = try header {
            for offset in [40, 48, 64] { $0.put((UInt64(1) << 56) - before, at: offset) }
            $0.put(UInt32(1), at: 60)
        }
        let counts = [header.l1EntryCount, header.refcountTableClusterCount, header.snapshotCount]
        #expect(counts == [UInt32](repeating: before == 0 ? 0 : 1, count: 3))
    }

    @Test("A name that leaves the first cluster is none")
    func name() throws {
        for (offset, count, isKept) in [
            (65536, 0, true), (65537, 0, false), (65530, 6, true), (65530, 7, false),
            (1 << 60, 1, false), (1 << 63, 0, false), (.max, 1, false),
        ] as [(UInt64, UInt32, Bool)] {
            let header = try header {
                $0.put(offset, at: 8)
                $0.put(count, at: 16)
            }
            #expect(header.backingFileOffset == (isKept ? offset : 0))
            #expect(header.backingFileByteCount == (isKept ? count : 0))
        }
    }

    @Test("Fields of version 3 that make no sense are left out, all of them")
    func fields() throws {
        let header = try header {
            $0.put(UInt64(1), at: 72)
            $0.put(UInt32(7), at: 96)
        }
        #expect(header.incompatibleFeatures.isEmpty && header.refcountOrder == 4)
        #expect(header.byteCount == 112)
    }

    @Test("Without a cluster size nothing is kept", arguments: [8, 9, 21, 22, 255])
    func clusterSize(bits: Int) throws {
        var bytes = ImageBuilder(byteCount: 1.MiB).build()
        bytes.put(UInt32(bits), at: 20)
        #expect(bytes.withUnsafeBytes { Header.lenient($0) == nil } == !(9...21).contains(bits))
        bytes.put(UInt32(16), at: 20)
        for version in [1, 4] as [UInt32] {
            bytes.put(version, at: 4)
            #expect(bytes.withUnsafeBytes { Header.lenient($0) == nil })
        }
    }
}
