import QCOW2
import TestSupport
import Testing

/// Counts that are made of the references, where blocks are missing; clusters and counts as in
/// `AllocatorTests`: 64 clusters a block, 64 blocks a cluster of the table.
@Suite("Counts made of references")
struct CountRebuildTests {
    let parts: AllocatorTests
    init() throws { parts = try AllocatorTests() }

    func rebuild(_ counts: [UInt64: UInt64]) throws {
        let counts = counts.merging([0: 1, 1: 1, 2: 1, 3: 1]) { first, _ in first }
        let referenced = counts.filter { $0.value > 0 }.keys.sorted()
        try parts.allocator.rebuild(highest: referenced.last ?? 0) {
            counts[$0] ?? 0
        } referenced: { body in
            referenced.forEach(body)
        }
    }

    func count(_ cluster: UInt64) throws -> UInt64 { try parts.allocator.count(of: cluster) }

    /// The refcount table of the next commit, as clusters.
    func table(_ frozen: ClusterAllocator.Frozen) -> [Int: UInt64] {
        let bytes = frozen.movedTable ?? frozen.pages.pieces.first?.bytes ?? []
        let entries = (0..<bytes.count / 8).map { ($0, bytes.number(at: $0 * 8, as: UInt64.self)) }
        return Dictionary(uniqueKeysWithValues: entries.filter { $0.1 != 0 }.map { ($0, $1 / 512) })
    }

    @Test("Counts there are become right, too high or too low")
    func inPlace() throws {
        _ = try parts.allocator.allocate(1)
        _ = parts.allocator.freeze()
        let taken = try #require(try parts.allocator.allocate(3))
        try parts.allocator.raise([taken])
        _ = parts.allocator.takeUnsyncedIncrements()
        // Whatever the blocks lie in counts as well, or they would be free.
        var counts: [UInt64: UInt64] = [65: 1, 66: 5, 100: 1]
        let blocks = Array(4...63) + (61...67).map { $0 * 64 } as [UInt64]
        for block in blocks {
            counts[block] = 1
        }
        counts[4097] = 1
        counts[4098] = 1
        try rebuild(counts)
        #expect(try [64, 65, 66, 67, 100].map(count) == [0, 1, 5, 0, 1])
        #expect(parts.allocator.takeUnsyncedIncrements() && parts.allocator.nextCluster == 1)
        #expect(!parts.allocator.isTableDirty)
    }

    @Test("Missing blocks lie behind everything, and count themselves")
    func missingBlocks() throws {
        try rebuild([10: 2, 150: 1, 200: 3])
        #expect(
            try [3, 4, 10, 150, 151, 199, 200, 201, 202, 203].map(count)
                == [1, 0, 2, 1, 0, 0, 3, 1, 1, 0])
        let frozen = parts.allocator.freeze()
        #expect(table(frozen) == [0: 3, 2: 202, 3: 201] && frozen.movedTable == nil)
        #expect(frozen.pages.pieces.map(\.offset) == [1024] && frozen.dropped.isEmpty)
        #expect(parts.guarded.isMetadata(201) && parts.guarded.isMetadata(202))
    }

    @Test("A block that lies in a range without one brings that range's block")
    func ownRange() throws {
        try rebuild([191: 1])
        #expect(try [190, 191, 192, 193, 194].map(count) == [0, 1, 1, 1, 0])
        #expect(table(parts.allocator.freeze()) == [0: 3, 2: 192, 3: 193])
    }

    @Test("Where the file is longer than its references, blocks lie behind the file")
    func behindTheFile() throws {
        try parts.file.write([UInt8](repeating: 1, count: 512), at: 100 * 512)
        try rebuild([70: 1])
        #expect(try [70, 100, 101, 102].map(count) == [1, 0, 1, 0])
        #expect(table(parts.allocator.freeze()) == [0: 3, 1: 101])
    }

    @Test("A table that is just long enough stays or grows by what its own blocks may need")
    func border() throws {
        try rebuild([4000: 1])
        #expect(parts.allocator.freeze().movedTable == nil)
        let nearEnd = try CountRebuildTests()
        try nearEnd.rebuild([4040: 1])
        #expect(nearEnd.parts.allocator.freeze().tableClusterCount == 2)
        let twice = try CountRebuildTests()
        try twice.rebuild([8070: 1])
        #expect(twice.parts.allocator.freeze().tableClusterCount == 2)
    }

    @Test("A table that finds no place, or would be too long, is not moved")
    func noPlace() throws {
        #expect {
            try rebuild([UInt64(8.MiB / 8 * 64): 1])
        } throws: { "\($0)".contains("the refcount table cannot grow any more") }
        parts.guarded.add(parts.run(5002, 1))
        #expect {
            try rebuild([5000: 1])
        } throws: { "\($0)".contains("metadata lies at") }
        #expect(!parts.allocator.isTableDirty)
    }

    @Test("The table becomes as long as it must be")
    func longerTable() throws {
        try rebuild([5000: 1])
        #expect(try [4999, 5000, 5001, 5002, 5003, 5004].map(count) == [0, 1, 1, 1, 1, 0])
        let frozen = parts.allocator.freeze()
        #expect(frozen.tableOffset == 5001 * 512 && frozen.tableClusterCount == 2)
        #expect(frozen.movedTable?.count == 2 * 512)
        #expect(frozen.dropped == [parts.run(2, 1)] && table(frozen) == [0: 3, 78: 5003])
        #expect(
            [2, 5000, 5001, 5002, 5003].map(parts.guarded.isMetadata)
                == [false, false, true, true, true])
    }
}
