import Glibc
import TestSupport

/// One thread's use of a mounted disk, beside a model of it.
struct DiskUser {
    let file: TestFile
    let model: ReferenceDisk
    let reservations: RangeReservations
    let clusterSize: Int
    var bitmaps: [BitmapModel] = []
    /// Bytes of the disk that stay there, whatever else goes on.
    let byteCount: Int
    /// Bytes of the disk at any time, at most.
    let largestByteCount: Int
    /// Whether the model knows what is read; not while the disk is replaced by another one.
    var isKnown = true

    func step(_ random: inout RepeatableRandom) throws {
        let range = range(&random)
        let kind = random.number(below: 20)
        var noise = random
        _ = try reservations.with(range) {
            switch kind {
            case 0..<7: try write(range, &noise)
            case 7..<9: try change(range) { try file.punch(range) }
            case 9..<11: try change(range) { try file.zero(range) }
            case 11..<15: try read(range)
            case 15..<17: try seek(range)
            case 17: try file.sync()
            case 18: try file.syncData()
            default: try file.allocate(FALLOC_FL_KEEP_SIZE, range)
            }
        }
        _ = random.next()
    }

    /// Anything from a byte to a few clusters; half of them aligned to sectors or clusters.
    private func range(_ random: inout RepeatableRandom) -> Range<Int> {
        let unit = [1, 512, 4096, clusterSize][random.number(below: 4)]
        let most = max(1, min(max(clusterSize * 2, 16.KiB), 256.KiB, byteCount / 8) / unit)
        let count = min((1 + random.number(below: most)) * unit, byteCount)
        // The end of the disk is where partial clusters are: go there now and then.
        if random.chance(oneIn: 12) { return byteCount - count..<byteCount }
        let start = random.number(below: (byteCount - count) / unit + 1) * unit
        return start..<start + count
    }

    private func write(_ range: Range<Int>, _ random: inout RepeatableRandom) throws {
        var bytes = [UInt8](repeating: UInt8(1 + random.number(below: 255)), count: range.count)
        // Mark every sector, so that a misplaced one shows.
        for position in stride(from: 0, to: bytes.count, by: 512) {
            bytes[position] = UInt8(truncatingIfNeeded: (range.lowerBound + position) / 512)
        }
        for bitmap in bitmaps { bitmap.note(range) }
        try file.write(bytes, at: range.lowerBound)
        bytes.withUnsafeBytes { model.write($0, at: range.lowerBound) }
    }

    /// Makes `range` read zero, and looks.
    private func change(_ range: Range<Int>, _ body: () throws -> Void) throws {
        for bitmap in bitmaps { bitmap.note(range) }
        try body()
        model.zero(range)
        try read(range)
    }

    private func read(_ range: Range<Int>) throws {
        let bytes = try file.read(range)
        let place = bytes.withUnsafeBytes { model.firstDifference(in: range, from: $0) }
        if isKnown, let place {
            throw RandomRun.Difference(
                description: "a read of \(range) differs from the model at \(place)")
        }
    }

    /// What lseek calls a hole must be zero in the model.
    private func seek(_ range: Range<Int>) throws {
        let data = try file.nextData(from: range.lowerBound) ?? largestByteCount
        let hole = range.lowerBound..<min(data, range.upperBound)
        if isKnown, !hole.isEmpty, !UnsafeRawBufferPointer(model[hole]).isZero {
            throw RandomRun.Difference(description: "SEEK_DATA leaps over data in \(hole)")
        }
        let end = try file.nextHole(from: range.lowerBound)
        guard end >= range.lowerBound, end <= largestByteCount else {
            throw RandomRun.Difference(description: "SEEK_HOLE answers \(end)")
        }
    }
}
