import Glibc
import TestSupport

/// QEMU's tools and the tests' own reader have the last word.
extension RandomRun {
    func judge(dataRanges: [Range<Int>]) throws {
        let check = try image.check()
        guard check.status == 0 else { throw Difference(description: "\(check)") }
        try judgeDisk(dataRanges)
        try judgeInfo()
        let audit = try ReferenceImage(image.path).qcow2.audit()
        guard audit.faults.isEmpty, audit.leakCount == 0 else {
            throw Difference(description: "\(audit.faults), \(audit.leakCount) leaks")
        }
        for (name, kept) in snapshots { try judge(snapshot: name, kept) }
        if combination.dataFile != nil { try judgeDataFile() }
        for bitmap in bitmaps { try judge(bitmap) }
    }

    private func judgeDisk(_ dataRanges: [Range<Int>]) throws {
        let raw = folder.file("model.raw")
        try model.save(to: raw)
        if let difference = try image.difference(from: raw) {
            throw Difference(description: difference)
        }
        let mapped = try image.dataRanges()
        guard try dataRanges == mapped || isExplained(dataRanges, mapped) else {
            throw Difference(description: "holes: lseek said \(dataRanges), qemu-img map \(mapped)")
        }
    }

    /// Pages of a hole that were read through a mapping are data on tmpfs, until the kernel drops
    /// them: a raw backing file may have fewer holes for lseek than for QEMU, which comes later.
    private func isExplained(_ dataRanges: [Range<Int>], _ mapped: [Range<Int>]) throws -> Bool {
        guard [.shorterRawBacking, .longerRawBacking].contains(combination.content),
            RangeSet(mapped).isSubset(of: RangeSet(dataRanges))
        else { return false }
        let backing = try TestFile(folder.file("base.raw"), O_RDONLY)
        return try RangeSet(dataRanges).subtracting(RangeSet(mapped)).ranges.allSatisfy { range in
            try range.upperBound <= backing.byteCount()
                && backing.read(range).allSatisfy { $0 == 0 }
        }
    }

    /// Sizes, names and flags.
    private func judgeInfo() throws {
        let info = try QemuImg.info(image.path)
        let granularities = Dictionary(uniqueKeysWithValues: info.bitmaps.map { ($0.name, $0) })
        guard info.byteCount == model.byteCount,
            info.snapshots.map(\.name).sorted() == snapshots.keys.sorted(),
            info.bitmaps.count == bitmaps.count,
            bitmaps.allSatisfy({
                granularities[$0.name]?.granularity == $0.granularity
                    && granularities[$0.name]?.flags == ($0.isEnabled ? ["auto"] : [])
            })
        else { throw Difference(description: "qemu-img info says \(info)") }
    }

    private func judge(snapshot name: String, _ kept: ReferenceDisk) throws {
        let reference = try ReferenceImage(image.path)
        let entry = try reference.qcow2.snapshots().entries.first { $0.name == name }
        guard let entry, entry.byteCount == kept.byteCount else {
            throw Difference(description: "snapshot \(name) is gone, or has another size")
        }
        // QEMU gives every snapshot the disk's present size.
        let theirs = try image.disk(in: folder, snapshot: name)
        let common = 0..<min(kept.byteCount, theirs.byteCount)
        let bytes = UnsafeRawBufferPointer(theirs[common])
        if let place = kept.firstDifference(in: common, from: bytes) {
            throw Difference(description: "QEMU finds snapshot \(name) changed at \(place)")
        }
        // What the tests' own reader cannot decrypt was compared through the mount.
        guard combination.encryption == nil, combination.content != .encryptedBacking else {
            return
        }
        if let place = try reference.firstDifference(from: kept, through: entry.table) {
            throw Difference(description: "snapshot \(name) changed at \(place)")
        }
    }

    /// A raw data file is the disk, as long as QEMU made it, or as the disk was made since.
    private func judgeDataFile() throws {
        let file = try TestFile(combination.dataFileName(in: folder), O_RDONLY)
        guard try file.byteCount() == dataFileByteCount else {
            throw Difference(
                description: "the data file has \(try file.byteCount()) bytes, not "
                    + "\(dataFileByteCount)")
        }
        guard combination.dataFile == .raw, combination.encryption == nil else { return }
        let disk = 0..<model.byteCount
        let bytes = try file.read(disk)
        if let place = bytes.withUnsafeBytes({ model.firstDifference(in: disk, from: $0) }) {
            throw Difference(description: "the raw data file differs from the disk at \(place)")
        }
    }

    /// It marks what has changed, all of it and nothing else; and QEMU finds that in it.
    private func judge(_ bitmap: BitmapModel) throws {
        guard try BitmapTests.marked(bitmap.name, of: image.path) == bitmap.ranges else {
            throw Difference(
                description: "the bitmap '\(bitmap.name)' marks "
                    + "\(try BitmapTests.marked(bitmap.name, of: image.path)), not \(bitmap.ranges)"
            )
        }
        try image.bitmap(
            "--add", "--merge", bitmap.name, "-g", "\(bitmap.granularity)", "copy")
        let copy = try ReferenceImage(image.path).qcow2.bitmaps().first { $0.name == "copy" }
        guard copy?.marked == bitmap.marked else {
            throw Difference(description: "QEMU finds another bitmap '\(bitmap.name)'")
        }
        try image.bitmap("--remove", "copy")
    }
}
