extension Image {
    /// Changes what kind of image the file at `path` is; what the guest reads stays.
    ///
    /// Whatever has to be written anew is written behind the end of the file; one write of the
    /// header makes it the image's, so that an interrupted amendment has not happened.
    /// - Parameters:
    ///   - path: Where the image is.
    ///   - options: What shall change.
    ///   - policy: Which other files may be opened.
    ///   - progress: Told what part is done; false cancels, and the image is as it was.
    /// - Throws: `.invalidArgument` where it cannot be, `.locked`, `.markedCorrupt`, `.cancelled`,
    ///   and for a change of size what `open` and `resize` throw.
    public static func amend(
        _ path: String, options: AmendOptions, policy: OpenPolicy = .imageDirectory,
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        let header = try ImageInfo(path: path).header
        if let header { _ = try options.amended(header, file: path) }
        if header?.incompatibleFeatures.contains(.dirty) == true {
            // Opening an image that was not closed rebuilds its counts.
            try Image.openAlone(path).close()
        }
        // Version 2 cannot change the size of an image with snapshots.
        if options.version == .v2 { try amendSize(path, options, policy) }
        try amendFile(path, options, progress)
        if options.version != .v2 { try amendSize(path, options, policy) }
    }

    private static func amendSize(
        _ path: String, _ options: AmendOptions, _ policy: OpenPolicy
    ) throws(ImageError) {
        guard let size = options.size else { return }
        let image = try Image.open(path, options: OpenOptions(policy: policy, passphrases: .locked))
        do throws(ImageError) {
            try image.resize(to: size)
        } catch {
            try image.close()
            throw error
        }
        try image.close()
    }

    private static func amendFile(
        _ path: String, _ options: AmendOptions, _ progress: ((Double) -> Bool)?
    ) throws(ImageError) {
        let device = try FileDevice(path: path, access: .readWrite, mapsBytes: false)
        defer { device.close() }
        try ImageLock.take(.writer, on: device)
        try amend(on: device, options: options, progress: progress)
    }

    /// Amends the image on a device, except for its size.
    package static func amend(
        on device: any BlockDevice, options: AmendOptions, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        let file = try HostFile(device)
        // What a killed predecessor left in the page cache becomes durable before it is believed.
        try file.flush()
        let header = try Header.readSupported(from: device)
        guard !header.incompatibleFeatures.contains(.corrupt) else {
            throw ImageError(.markedCorrupt, file: device.name)
        }
        let wanted = try options.amended(header, file: device.name)
        guard wanted != header else { return }
        var amendment = Amendment(file, from: header, to: wanted, progress)
        let end = file.writtenEnd
        do throws(ImageError) {
            try amendment.makeStructures()
            try file.flush()
        } catch {
            // Nothing refers to what was made.
            if device.readsZerosPastEnd { try file.resize(to: end) }
            throw error
        }
        try HeaderRewrite(of: file).replace(by: amendment.new)
        try amendment.correctFlags()
    }
}

/// Tables that an amended image needs anew, behind the end of the old one.
struct Amendment {
    private let file: HostFile
    private let old: Header
    /// The header that is wanted; its tables are where they were made.
    private(set) var new: Header
    private var counts: ReferenceCounts?
    /// Where the next table goes.
    private var end: UInt64
    /// Told what part is done; false cancels.
    private let progress: ((Double) -> Bool)?
    /// L2 tables that were looked at, and about how many there are to look at.
    private var doneCount: UInt64 = 0
    private var tableCount: UInt64 = 0

    init(
        _ file: HostFile, from old: Header, to new: Header, _ progress: ((Double) -> Bool)? = nil
    ) {
        self.file = file
        self.progress = progress
        self.old = old
        self.new = new
        end = (file.writtenEnd &+ old.clusterByteCount &- 1) & ~(old.clusterByteCount &- 1)
    }

    mutating func makeStructures() throws(ImageError) {
        if progress != nil {
            tableCount = try ReferenceWalk(file.device, header: old) { _ in }.tableCount()
        }
        var needsCounts = new.refcountOrder != old.refcountOrder
        if new.version == 2, old.version == 3 {
            if try expandZeroes() { needsCounts = true }
        } else if new.version == 3, old.version == 2 {
            if try completeSnapshots() { needsCounts = true }
        }
        if needsCounts { try countAnew() }
    }

    /// Writes a table to clusters of its own, and returns where they start.
    mutating func append(_ bytes: [UInt8]) throws(ImageError) -> UInt64 {
        let offset = end
        let mask = old.clusterByteCount &- 1
        let whole = bytes + [UInt8](repeating: 0, count: Int((0 &- UInt64(bytes.count)) & mask))
        try file.write(whole, at: offset)
        end &+= UInt64(whole.count)
        return offset
    }

    /// Version 3 asks for the disk's size in every snapshot, which version 2 need not have.
    private mutating func completeSnapshots() throws(ImageError) -> Bool {
        var snapshots = try old.readSnapshots(from: file.device).snapshots
        guard snapshots.contains(where: { $0.extraData.count < 16 }) else { return false }
        for index in snapshots.indices where snapshots[index].extraData.count < 16 {
            var extra = [UInt8](repeating: 0, count: 16)
            extra.storeBigEndian(snapshots[index].vmStateByteCount, at: 0)
            extra.storeBigEndian(old.virtualByteCount, at: 8)
            snapshots[index].extraData = extra
        }
        new.snapshotsOffset = try append(Snapshot.encodeTable(snapshots))
        return true
    }

    /// Version 2 has no zero clusters: tables without any take the places of those with some, for
    /// the disk and for its snapshots, and no cluster of data is touched.
    private mutating func expandZeroes() throws(ImageError) -> Bool {
        var snapshots = try old.readSnapshots(from: file.device).snapshots
        guard
            snapshots.allSatisfy({
                $0.vmStateByteCount <= UInt64(UInt32.max)
                    && ($0.diskByteCount ?? old.virtualByteCount) == old.virtualByteCount
            })
        else {
            throw ImageError(
                .invalidArgument(
                    "has snapshots of another size, which version 2 (compat=0.10) cannot hold"),
                file: file.name)
        }
        var expansion = ZeroExpansion(
            old, hidesBacking: new.backingFile != nil, tableCount: snapshots.count + 1)
        var hasChanged = false
        if let table = try expanded(old.l1Offset, old.l1EntryCount, &expansion) {
            new.l1Offset = try append(table)
            hasChanged = true
        }
        var haveMoved = false
        for index in snapshots.indices {
            let (offset, count) = (snapshots[index].l1Offset, snapshots[index].l1EntryCount)
            guard let table = try expanded(offset, count, &expansion) else { continue }
            snapshots[index].l1Offset = try append(table)
            haveMoved = true
        }
        if haveMoved { new.snapshotsOffset = try append(Snapshot.encodeTable(snapshots)) }
        return hasChanged || haveMoved
    }

    /// An L1 table whose L2 tables have no zero clusters; nil where none of them had any.
    private mutating func expanded(
        _ l1Offset: UInt64, _ entryCount: UInt32, _ expansion: inout ZeroExpansion
    ) throws(ImageError) -> [UInt8]? {
        var table = try Header.read(Int(entryCount) * 8, at: l1Offset, of: file.device)
        var hasChanged = false
        for position in stride(from: 0, to: table.count - table.count % 8, by: 8) {
            let bits = table.withRawBytes { $0.bigEndian(at: position, as: UInt64.self) } ?? 0
            let entry = L1Entry(bits: bits)
            guard entry.offset != 0 else { continue }
            doneCount += 1
            if isCancelled(after: doneCount) { throw ImageError(.cancelled, file: file.name) }
            let place = try expansion.place(ofTableAt: entry.offset) {
                offset throws(ImageError) in
                try Header.read(Int(old.clusterByteCount), at: offset, of: file.device)
            } append: { bytes throws(ImageError) in
                try append(bytes)
            }
            guard place != entry.offset else { continue }
            table.storeBigEndian(place | bits & ~L1Entry.offsetMask, at: position)
            hasChanged = true
        }
        return hasChanged ? table : nil
    }

    /// Reference counts of the new width for the image as the new header has it.
    private mutating func countAnew() throws(ImageError) {
        var damage: CheckFinding?
        var count = doneCount
        let rebuild = try RefcountRebuild(
            file.device, header: new,
            tableRead: { [self] () throws(ImageError) in
                count += 1
                if isCancelled(after: count) { throw ImageError(.cancelled, file: file.name) }
            }, report: { damage = damage ?? $0 })
        if let damage {
            if case .countTooLarge = damage {
                throw ImageError(
                    .invalidArgument(
                        "a cluster has more references than \(new.refcountBits) bits can count"),
                    file: file.name)
            }
            throw file.corrupt("\(damage): repair it first, with check --repair all")
        }
        for edit in rebuild.newStructures { try file.write(edit.bytes, at: edit.offset) }
        new.refcountTableOffset = rebuild.tableOffset
        new.refcountTableClusterCount = UInt32(clamping: rebuild.tableClusterCount)
        new.l1Offset = rebuild.l1Offset
        counts = rebuild.allCounts
    }

    private func isCancelled(after count: UInt64) -> Bool {
        guard let progress else { return false }
        return !progress(min(Double(count) / Double(max(tableCount, 1)), 1))
    }

    /// Sets COPIED where a cluster has one reference now; until then it only costs a copy.
    func correctFlags() throws(ImageError) {
        guard let counts, new.version == 2 else { return }
        var corrections = try TableCorrections(file.device, new, counts)
        try corrections.correctActive(
            count: { counts.count(of: $0) }, clearsMeaningless: false)
        for edit in corrections.l1Edits + corrections.edits {
            try file.write(edit.bytes, at: edit.offset)
        }
        try file.flush()
    }
}
