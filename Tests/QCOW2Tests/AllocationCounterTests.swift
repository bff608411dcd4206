import QCOW2
import Synchronization
import TestSupport
import Testing

/// What `st_blocks` says of an image whose raw backing file changes its holes.
@Suite("Allocated bytes")
struct AllocationCounterTests {
    /// A disk all of whose holes are data from some moment on, as those of a file on tmpfs are once
    /// it was read.
    private final class FillingDisk: ForwardingDevice {
        let base: any BlockDevice
        let isFilled = Atomic(false)

        init(_ base: any BlockDevice) { self.base = base }

        func nextData(from offset: UInt64) throws(SystemError) -> UInt64? {
            guard isFilled.load(ordering: .relaxed) else { return try base.nextData(from: offset) }
            return try offset < base.byteCount() ? offset : nil
        }

        func nextHole(from offset: UInt64) throws(SystemError) -> UInt64 {
            guard isFilled.load(ordering: .relaxed) else { return try base.nextHole(from: offset) }
            return try base.byteCount()
        }
    }

    @Test("They change by what was counted, whatever becomes of a raw file's holes")
    func filledHoles() throws {
        let base = RAMDisk(byteCount: UInt64(2.MiB))
        try [UInt8](repeating: 0xBB, count: 512.KiB).withUnsafeBytes {
            try base.write($0, at: UInt64(1.MiB))
        }
        let disk = FillingDisk(base)
        var builder = ImageBuilder(byteCount: 2.MiB)
        builder.backingName = "base"
        builder.fill(0x11, guestCluster: 0)
        let image = try Image.open(
            RecordingDevice(builder.build(), yielding: false), backing: [.raw(disk)])
        image.startCountingAllocation()
        var expected = UInt64(64.KiB + 512.KiB)
        #expect(image.allocatedByteCount == expected)
        disk.isFilled.store(true, ordering: .relaxed)
        try image.discard(UInt64(256.KiB)..<UInt64(512.KiB))
        #expect(image.allocatedByteCount == expected, "a hole was hidden")
        try image.discard(UInt64(1.MiB)..<UInt64(1.MiB + 256.KiB))
        expected -= UInt64(256.KiB)
        #expect(image.allocatedByteCount == expected, "data was hidden")
        try image.write([1], at: 768.KiB)
        expected += UInt64(64.KiB)
        #expect(image.allocatedByteCount == expected, "a hole was written to")
        try image.close()
    }

    @Test("Runs of data and holes are found again, up to the end of what is known")
    func runs() {
        var runs = ShownRuns()
        #expect(runs.holeOrData(at: 0, limit: 1) == nil)
        for (range, isHole) in [
            (0..<10, false), (10..<20, false), (20..<30, true), (30..<40, false), (40..<50, true),
        ] as [(Range<UInt64>, Bool)] { runs.keep(range, isHole: isHole) }
        // What does not follow is not known either.
        runs.keep(60..<70, isHole: false)
        for offset in 0..<50 as Range<UInt64> {
            let end: UInt64 = [20, 30, 40, 50].first { $0 > offset } ?? 0
            let found = runs.holeOrData(at: offset, limit: 100)
            #expect(found?.byteCount == end - offset)
            #expect(found?.isHole == (20..<30 ~= offset || offset >= 40))
            #expect(runs.holeOrData(at: offset, limit: 1)?.byteCount == 1)
        }
        #expect(runs.holeOrData(at: 50, limit: 1) == nil)
    }

    @Test("More runs than there is room for are not kept")
    func limit() {
        var runs = ShownRuns()
        var offset: UInt64 = 0
        while !runs.isFull {
            runs.keep(offset..<offset + 1, isHole: offset % 2 == 0)
            offset += 1
        }
        #expect(offset == 1 << 19)
        runs.keep(offset..<offset + 1, isHole: true)
        #expect(runs.holeOrData(at: offset - 1, limit: 9)?.isHole == false)
        #expect(runs.holeOrData(at: offset, limit: 1) == nil)
    }
}
