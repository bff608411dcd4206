import QCOW2
import Testing

/// What is noted of changes while a snapshot is being made.
@Suite("Changes behind a snapshot's boundary")
struct SnapshotCaptureTests {
    let capture = SnapshotCapture()
    let own = L2Entry(copiedClusterAt: 4096)
    let stream = L2Entry(bits: 1 << 62 | 8192)

    func run(_ first: UInt64, _ count: UInt64) -> ClusterRun {
        ClusterRun(first: first, count: count)
    }

    @Test("What lies before the boundary is covered, and nothing once the snapshot is there")
    func boundary() {
        #expect(!capture.covers(0) && !capture.covers(table: 0))
        capture.cover(upTo: 5)
        capture.cover(tablesUpTo: 3)
        #expect([4, 5, 6].map { capture.covers($0) } == [true, false, false])
        #expect([2, 3, 4].map { capture.covers(table: $0) } == [true, false, false])
        #expect(capture.coveredClusterCount == 5 && capture.coveredTableCount == 3)
        capture.followTable(1, 2)
        capture.end()
        #expect(!capture.covers(0) && !capture.covers(table: 0))
        #expect(capture.coveredClusterCount == 0 && capture.coveredTableCount == 0)
        #expect(capture.takeChanges().gained.isEmpty)
    }

    @Test("A cluster that changes hands is lost by one entry and gained by another")
    func follow() {
        #expect(capture.follow(.unallocated, own, clusterBits: 12) == own.withoutCopied)
        var changes = capture.takeChanges()
        #expect(changes.gained == [run(1, 1)] && changes.lost == [])
        #expect(capture.follow(own, .unallocated, clusterBits: 12) == .unallocated)
        changes = capture.takeChanges()
        #expect(changes.gained == [] && changes.lost == [run(1, 1)])
        #expect(capture.follow(own, stream, clusterBits: 12) == stream)
        #expect(capture.follow(stream, own, clusterBits: 12) == own.withoutCopied)
        changes = capture.takeChanges()
        #expect(changes.gained == [run(2, 1), run(1, 1)])
        #expect(changes.lost == [run(1, 2)])
        #expect(capture.follow(stream, stream, clusterBits: 12) == stream)
        changes = capture.takeChanges()
        #expect(changes.gained == [run(2, 1)] && changes.lost == [run(2, 1)])
        // The same cluster under another meaning has the same reference.
        #expect(
            capture.follow(own, own.withZeroFlag, clusterBits: 12)
                == own.withZeroFlag.withoutCopied)
        changes = capture.takeChanges()
        #expect(changes.gained == [] && changes.lost == [])
    }

    @Test("A table that is replaced is followed likewise; what was taken can be put back")
    func tables() {
        capture.followTable(nil, 7)
        capture.followTable(4, 8)
        capture.followTable(5, 20)
        let changes = capture.takeChanges()
        #expect(changes.gained == [run(7, 2), run(20, 1)] && changes.lost == [run(4, 2)])
        #expect(capture.takeChanges().gained == [])
        capture.followTable(1, 2)
        capture.putBack(changes)
        let all = capture.takeChanges()
        #expect(all.gained == [run(2, 1), run(7, 2), run(20, 1)])
        #expect(all.lost == [run(1, 1), run(4, 2)])
    }
}
