/// A change of one bitmap of an image.
public enum BitmapChange: Sendable, Equatable {
    /// Makes the bitmap, enabled and without a mark.  Granularity is in bytes, a power of two; nil
    /// takes the cluster size, between 4 KiB and 64 KiB.
    case add(granularity: UInt64?)
    /// Takes the bitmap out of the image, with its clusters.
    case remove
    /// Takes every mark away.
    case clear
    /// Records what clients change, from the next session on.
    case enable
    /// Records nothing any more; what is marked stays marked.
    case disable
    /// Marks also what another bitmap marks: of the same image, or of the one at `path`.
    case merge(source: String, path: String?)
}

extension Image {
    /// Makes `changes`, one after the other, to the bitmap `name` of the image at `path`, and
    /// stores the result; no backing file is opened.
    /// - Throws: `.invalidArgument` for what cannot be done, and then nothing was changed;
    ///   `.locked` where a program uses the image; what opening throws.
    public static func changeBitmap(
        _ name: String, of path: String, _ changes: [BitmapChange]
    ) throws(ImageError) {
        let image = try Image.openAlone(path, access: .readWrite)
        do throws(ImageError) {
            try image.changeBitmap(Array(name.utf8), changes)
        } catch {
            // What went wrong first is what counts.
            try? image.close()
            throw error
        }
        try image.close()
    }

    /// Plans `changes` to the bitmap `name`, in a session that writes nothing else; closing the
    /// image stores them.
    package func changeBitmap(
        _ name: [UInt8], _ changes: [BitmapChange]
    ) throws(ImageError) {
        let writing = try writer()
        guard header.version >= 3 else {
            throw refusal("a version 2 image cannot have bitmaps")
        }
        var plan = BitmapPlan(image: self, name: name)
        // Everything is tried before the image is touched.
        try plan.run(changes)
        guard plan.changesSomething else { return }
        try begin(writing)
        writing.bitmaps.take(plan.bitmaps, removed: plan.removed)
    }

    fileprivate func refusal(_ words: String) -> ImageError {
        ImageError(.invalidArgument(words), file: top.file.name)
    }
}

/// What shall become of an image's bitmaps.
private struct BitmapPlan {
    private let image: Image
    private let name: [UInt8]
    private(set) var bitmaps: [LiveBitmap] = []
    /// Stored ones that are no more.
    private(set) var removed: [LiveBitmap] = []
    /// Whether the image is another one afterwards.
    private(set) var changesSomething = false

    init(image: Image, name: [UInt8]) {
        self.image = image
        self.name = name
    }

    private var words: String { "'\(String(decoding: name, as: UTF8.self))'" }

    mutating func run(_ changes: [BitmapChange]) throws(ImageError) {
        let entries = try image.header.readBitmaps(from: image.top.file.device)
        bitmaps = entries.map {
            LiveBitmap(
                stored: $0, diskByteCount: image.size, clusterBits: image.header.clusterBits)
        }
        for change in changes { try run(change) }
    }

    private mutating func run(_ change: BitmapChange) throws(ImageError) {
        switch change {
        case .enable: return try setAuto(true)
        case .disable: return try setAuto(false)
        case .add(let granularity): try add(granularity)
        case .remove:
            let index = try index()
            if bitmaps[index].condition == .foreign {
                try bitmaps[index].requireValid(in: image.top.file)
            }
            removed.append(bitmaps.remove(at: index))
        case .clear:
            let index = try validIndex()
            bitmaps[index].keptByteCount = 0
            bitmaps[index].marks = []
        case .merge(let source, let path): try merge(source, path)
        }
        changesSomething = true
    }

    private mutating func setAuto(_ isAuto: Bool) throws(ImageError) {
        let index = try validIndex()
        guard bitmaps[index].entry.isAuto != isAuto else { return }
        bitmaps[index].entry.flags ^= BitmapEntry.auto
        changesSomething = true
    }

    private func index() throws(ImageError) -> Int {
        guard let index = bitmaps.firstIndex(where: { $0.entry.nameBytes == name }) else {
            throw image.refusal("there is no bitmap \(words)")
        }
        return index
    }

    private func validIndex() throws(ImageError) -> Int {
        let index = try index()
        try bitmaps[index].requireValid(in: image.top.file)
        return index
    }

    // MARK: Adding

    private mutating func add(_ granularity: UInt64?) throws(ImageError) {
        let granularity = granularity ?? min(max(image.clusterByteCount, 4096), 65536)
        try checkAddition(granularity)
        bitmaps.append(
            LiveBitmap(
                new: name, granularityBits: UInt8(clamping: granularity.trailingZeroBitCount)))
        let count = UInt64(bitmaps.count)
        let byteCount = BitmapEntry.encodeDirectory(bitmaps.map(\.entry)).count
        guard count <= Limits.bitmapCount, byteCount <= Limits.bitmapDirectoryByteCount else {
            throw image.refusal("no more bitmaps fit in an image")
        }
    }

    private func checkAddition(_ granularity: UInt64) throws(ImageError) {
        guard !bitmaps.contains(where: { $0.entry.nameBytes == name }) else {
            throw image.refusal("a bitmap \(words) exists already")
        }
        guard (1...Limits.bitmapNameByteCount).contains(UInt64(name.count)) else {
            throw image.refusal("a bitmap's name has 1 to 1023 bytes, this one \(name.count)")
        }
        guard image.size > 0 else {
            throw image.refusal("a disk of 0 bytes cannot have bitmaps: resize it first")
        }
        let bits = UInt8(clamping: granularity.trailingZeroBitCount)
        guard granularity.nonzeroBitCount == 1, Limits.bitmapGranularityBits.contains(bits) else {
            throw image.refusal(
                "a bitmap's granularity is a power of two from 512 to 2G, \(granularity) is not")
        }
        guard image.size <= Limits.newBitmapGranuleCount << UInt64(bits) else {
            throw image.refusal(
                "a bitmap with a granularity of \(granularity) bytes is too large for this disk; "
                    + "take a larger one")
        }
    }

    // MARK: Merging

    private mutating func merge(_ source: String, _ path: String?) throws(ImageError) {
        let index = try validIndex()
        let marks = try DirtyTracker.Marks(
            granularityBits: bitmaps[index].entry.granularityBits)
        func mark(_ range: Range<UInt64>) {
            marks.pointer.pointee.mark(
                range.lowerBound, range.upperBound &- range.lowerBound)
        }
        guard let path else {
            // It marks itself already.
            if Array(source.utf8) == name { return }
            try image.forEachRange(markedBy: source, mark)
            return bitmaps[index].marks.append(marks)
        }
        let other = try Image.openAlone(path, access: .readOnly)
        defer { try? other.close() }
        guard other.size == image.size else {
            throw image.refusal(
                "the bitmaps are of disks of different sizes: \(image.size) bytes here, "
                    + "\(other.size) in \(path)")
        }
        try other.forEachRange(markedBy: source, mark)
        bitmaps[index].marks.append(marks)
    }
}
