/// Keeps the metadata of an image without a guest's data, to be shown to somebody who looks for
/// what is wrong with it.
///
/// The header, its extensions, all tables, counts and directories are kept at their places in the
/// file.  Guest data is not, compressed or not, nor what lies behind the end of a table in its
/// cluster, nor anything that opens an encrypted disk.  Damaged images are what this is for: tables
/// that make no sense are followed as far as they lead to tables.
public struct Dehydration: Sendable {
    /// Whether names of backing files, data files, snapshots and bitmaps are replaced by others of
    /// the same length.
    public var redactsNames = false

    /// One that keeps names.
    public init() {}

    /// What was kept.
    public struct Summary: Sendable, Equatable {
        /// Bytes of metadata that are not zero, in runs of 64 KiB at most.
        public var metadataByteCount: UInt64 = 0
        /// Bytes of the image's file.
        public var byteCount: UInt64 = 0
        /// Entries that were left out because they might have been a guest's bytes.
        public var omittedEntryCount: UInt64 = 0
        /// What else is missing, in words.
        public var notes: [String] = []
    }

    /// Keeps the metadata of the image at `path` in a new file at `target`, which takes its place
    /// when it is complete.
    ///
    /// - Parameters:
    ///   - path: Where the image is.
    ///   - target: What the new file is called.
    ///   - locking: What keeps writers away meanwhile.
    ///   - progress: Told what part is done; false cancels.
    /// - Throws: `.notQCOW2`, `.locked`, `.system`, `.cancelled`.
    public func run(
        path: String, toFileAt target: String, locking: OpenOptions.Locking = .required,
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) -> Summary {
        let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        defer { device.close() }
        try ImageLock.take(locking == .required ? .reader : .forceShare, on: device)
        guard !FileReplacement.areSame(path, target) else {
            throw ImageError(
                .invalidArgument("the image cannot be replaced by its own metadata"), file: target)
        }
        let file = try FileReplacement(of: target)
        let summary = try run(device, to: file.device, progress: progress)
        try file.commit()
        return summary
    }

    /// Keeps the metadata of the image on `device` on `target`, whose content is lost.
    /// - Throws: `.notQCOW2`, `.system`, `.cancelled`.
    public func run(
        _ device: any BlockDevice, to target: any BlockDevice,
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) -> Summary {
        let fileByteCount: UInt64
        do throws(SystemError) {
            fileByteCount = try device.byteCount()
        } catch {
            throw ImageError(.system(error, operation: "cannot find the length"), file: device.name)
        }
        // No header is longer than the largest cluster.
        let start = try Header.read(1 << Int(Limits.clusterBits.upperBound), at: 0, of: device)
        let header = try Self.header(start, device)
        var summary = Summary()
        var regions: [MetadataSurvey.Region] = []
        var filter: TableFilter?
        if let header {
            var survey = try MetadataSurvey(
                device, header, fileByteCount: fileByteCount, redactsNames: redactsNames)
            try survey.run { progress?($0 / 2) ?? true }
            regions = survey.regions.sorted { $0.offset < $1.offset }
            filter = survey.filter
            summary.notes = survey.notes
        } else {
            summary.notes = ["the header makes no sense: only its fixed part is kept"]
        }
        let kept = HeaderMask(redactsNames: redactsNames).keep(start, header)
        // Before whatever damage has made begin at 0 too.
        regions.insert(
            MetadataSurvey.Region(offset: 0, byteCount: UInt64(kept.count), content: .bytes(kept)),
            at: 0)
        var writer = try SkeletonFile.Writer(
            target, imageByteCount: fileByteCount, redactsNames: redactsNames)
        let copy = RegionCopy(device: device, fileByteCount: fileByteCount, filter: filter)
        try copy.run(regions, to: &writer, &summary) { progress?(0.5 + $0 / 2) ?? true }
        try writer.finish()
        summary.byteCount = writer.byteCount
        return summary
    }

    /// The header, as far as it can be read; nil where even the cluster size makes no sense.
    private static func header(
        _ start: [UInt8], _ device: any BlockDevice
    ) throws(ImageError) -> Header? {
        guard start.withRawBytes({ $0.bigEndian(at: 0, as: UInt32.self) }) == Header.magic else {
            throw ImageError(.notQCOW2, file: device.name)
        }
        return start.withRawBytes { Header.lenient($0) }
    }
}

/// Copies what passes of regions, which are in the order of their offsets.
private struct RegionCopy {
    let device: any BlockDevice
    let fileByteCount: UInt64
    let filter: TableFilter?

    func run(
        _ regions: [MetadataSurvey.Region], to writer: inout SkeletonFile.Writer,
        _ summary: inout Dehydration.Summary, _ progress: (Double) -> Bool
    ) throws(ImageError) {
        var buffer = [UInt8](repeating: 0, count: SkeletonFile.runByteCount)
        var end: UInt64 = 0
        for (number, region) in regions.enumerated() {
            let limit = min(region.offset &+ region.byteCount, fileByteCount)
            // Where damaged tables overlap the first one has the bytes; entries stay whole.
            var into = region.offset < end ? (end - region.offset + 15) & ~15 : 0
            while region.offset &+ into < limit {
                let offset = region.offset &+ into
                let count = Int(min(UInt64(buffer.count), limit - offset))
                summary.omittedEntryCount += try fill(
                    &buffer, count, Int(into), from: region, at: offset)
                try buffer.withRawBytes { bytes throws(ImageError) in
                    let part = UnsafeRawBufferPointer(rebasing: bytes[..<count])
                    if !ZeroScan.isZero(part) { summary.metadataByteCount += UInt64(count) }
                    try writer.add(part, at: offset)
                }
                into += UInt64(count)
                end = offset + UInt64(count)
            }
            if number % 64 == 0, !progress(Double(number) / Double(regions.count)) {
                throw ImageError(.cancelled, file: device.name)
            }
        }
    }

    /// Returns how many entries did not pass.
    private func fill(
        _ buffer: inout [UInt8], _ count: Int, _ into: Int,
        from region: MetadataSurvey.Region, at offset: UInt64
    ) throws(ImageError) -> UInt64 {
        switch region.content {
        case .bytes(let bytes):
            buffer.replaceSubrange(..<count, with: bytes[into..<into + count])
            return 0
        case .table(let kind, let isTrusted):
            return try buffer.withMutableRawBytes { bytes throws(ImageError) -> UInt64 in
                let part = UnsafeMutableRawBufferPointer(rebasing: bytes[..<count])
                do throws(SystemError) {
                    try device.readPadded(into: part, at: offset)
                } catch {
                    throw ImageError(
                        .system(error, operation: "cannot read at offset \(offset)"),
                        file: device.name)
                }
                return isTrusted ? 0 : filter?.apply(kind, to: part).dropped ?? 0
            }
        }
    }
}
