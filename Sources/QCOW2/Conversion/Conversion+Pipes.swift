/// Copies from and to pipes, which have no second chance.
extension Conversion {
    // MARK: To a pipe

    /// Writes the new file to an open descriptor, front to back.
    ///
    /// A raw disk is written as it is, zeros included.  An image is written in one pass: the source
    /// is read twice, first to learn which clusters hold something.  What cannot be laid out before
    /// it is made (compressed, encrypted or preallocated images) is made in a file without a name
    /// in `spoolDirectory` first.
    ///
    /// Who calls this ignores SIGPIPE, or dies of a reader that goes away.
    /// - Throws: `.invalidArgument` where a directory to spool in is needed and not given, and what
    ///   reading and writing throw.
    public func run(
        from source: SourceDisk, toDescriptor descriptor: Int32, name: String,
        spoolDirectory: String? = nil, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        try checkOptions(name)
        let output = OrderedOutput(descriptor, name: name)
        guard case .qcow2(let options) = target else {
            try writeRaw(source, to: output, progress)
            return try source.finish()
        }
        guard options.dataFile == nil else {
            throw ImageError(
                .invalidArgument("an image in a pipe has no external data file"), file: name)
        }
        if compresses || options.encryption != nil || options.preallocation != .off {
            return try spool(source, in: spoolDirectory, to: output, name, progress)
        }
        guard !source.isSequential else {
            throw IncomingDisk.needsSpool(
                "an image is written to a pipe from a source that can be read twice", name)
        }
        try options.check(file: name)
        let empty = try Self.emptyImage(of: source.size, options, name)
        var allocation = StreamedImage.Allocation(
            clusterBits: UInt64(empty.clusterBits),
            tableBits: UInt64(empty.clusterBits) - (options.hasExtendedL2 ? 4 : 3))
        // Half of the way is finding out what there is.
        try find(source, &allocation) { part in progress?(part / 2) ?? true }
        let image = try StreamedImage(like: empty, allocation, file: name)
        let cursor = Monitor(StreamedImage.Cursor())
        let size = Double(max(source.size, 1))
        try output.run(
            from: source, threadCount: threadCount,
            progress: { done in progress?(0.5 + Double(done) / size / 2) ?? true }
        ) { () throws(ImageError) in
            try cursor.withLock { cursor throws(ImageError) in try image.next(&cursor) }
        }
    }

    private func writeRaw(
        _ source: SourceDisk, to output: OrderedOutput, _ progress: ((Double) -> Bool)?
    ) throws(ImageError) {
        let place = Monitor((offset: UInt64(0), known: KnownRun()))
        let size = source.size
        try output.run(
            from: source, threadCount: threadCount,
            progress: { done in progress?(Double(done) / Double(max(size, 1))) ?? true }
        ) { () throws(ImageError) in
            try place.withLock { place throws(ImageError) -> OrderedOutput.Piece? in
                guard place.offset < size else { return nil }
                let run = try place.known.run(of: source, at: place.offset)
                let start = place.offset
                if run.isHole {
                    place.offset += run.byteCount
                    return .zeros(run.byteCount)
                }
                let count = min(run.byteCount, DiskWalk.pieceByteCount)
                place.offset += count
                return .disk(offset: start, count: Int(count), byteCount: Int(count))
            }
        }
    }

    /// Finds the clusters that hold something.
    private func find(
        _ source: SourceDisk, _ allocation: inout StreamedImage.Allocation,
        _ progress: @escaping (Double) -> Bool
    ) throws(ImageError) {
        let cluster: UInt64 = 1 << allocation.clusterBits
        if sparseByteCount == 0 {
            if source.size > 0 { allocation.insert(0..<source.size) }
            return
        }
        let found = Monitor(allocation)
        try DiskWalk(over: [source]).run(threadCount: threadCount, progress: progress) {
            piece, buffer throws(ImageError) in
            if piece.isHole { return }
            let bytes = UnsafeMutableRawBufferPointer(
                rebasing: buffer[..<Int(piece.range.upperBound - piece.range.lowerBound)])
            try source.read(into: bytes, at: piece.range.lowerBound)
            let looked = UnsafeRawBufferPointer(bytes)
            var done = 0
            while done < looked.count {
                let run = ZeroScan.run(
                    in: looked, from: done, at: piece.range.lowerBound, unitByteCount: cluster)
                let start = piece.range.lowerBound + UInt64(done)
                let end = piece.range.lowerBound + UInt64(run.end)
                if !run.isZero { found.withLock { $0.insert(start..<end) } }
                done = run.end
            }
        }
        allocation = found.withLock { $0 }
    }

    /// The header of an image as `options` want it, which has no clusters yet.
    private static func emptyImage(
        of size: UInt64, _ options: CreateOptions, _ name: String
    ) throws(ImageError) -> Header {
        let device = RAMDisk(name: name)
        try Image.create(on: device, size: size, options: options)
        return try Header.read(from: device)
    }

    /// Makes the new file in a directory, and then writes it.
    private func spool(
        _ source: SourceDisk, in directory: String?, to output: OrderedOutput, _ name: String,
        _ progress: ((Double) -> Bool)?
    ) throws(ImageError) {
        guard let directory else {
            throw IncomingDisk.needsSpool(
                "a compressed, encrypted or preallocated image is not known before it is made",
                name)
        }
        let file = try SpoolFile.make(in: directory, name: name)
        defer { file.close() }
        try run(from: source, to: file, progress: progress)
        var copy = Conversion(to: .raw)
        copy.threadCount = 1
        try copy.writeRaw(SourceDisk(file), to: output, nil)
    }

    // MARK: From a pipe

    /// Copies a raw disk that comes through a pipe to a new file at `path`, as
    /// `run(from:toFileAt:)` does.
    /// - Throws: What reading and writing throw; `.locked` where a program uses the file that is
    ///   there.
    public func run(from stream: RawStream, toFileAt path: String) throws(ImageError) {
        try checkOptions(path)
        let file = try FileReplacement(of: path)
        switch target {
        case .raw:
            let sink = try RawSink(file.device, size: 0, keepsZeros: sparseByteCount == 0)
            let end = try copy(stream, to: sink, unit: max(sparseByteCount, 512))
            try sink.setEnd(end)
        case .qcow2(let options):
            try copy(stream, toImageOn: file.device, options)
        }
        try file.commit()
    }

    /// Copies a raw disk that comes through a pipe to another pipe.
    /// - Throws: `.system` for what either pipe said.
    public static func copy(
        _ stream: RawStream, toDescriptor descriptor: Int32, name: String
    ) throws(ImageError) {
        try stream.forEachPart(of: 1 << 20) { bytes, _ throws(ImageError) in
            do throws(SystemError) {
                try writeToPipe(descriptor, UnsafeRawBufferPointer(bytes))
            } catch {
                throw ImageError(.system(error, operation: "cannot write"), file: name)
            }
        }
    }

    /// Returns where the disk ends.
    private func copy(
        _ stream: RawStream, to sink: some DiskSink, unit: UInt64,
        prepare: (UInt64) throws(ImageError) -> Void = { (_) throws(ImageError) in }
    ) throws(ImageError) -> UInt64 {
        var end: UInt64 = 0
        try stream.forEachPart(of: 2 << 20) { bytes, offset throws(ImageError) in
            end = offset + UInt64(bytes.count)
            try prepare(end)
            try Self.store(UnsafeRawBufferPointer(bytes), at: offset, in: sink, unit: unit)
        }
        return end
    }

    private func copy(
        _ stream: RawStream, toImageOn device: any BlockDevice, _ options: CreateOptions
    ) throws(ImageError) {
        guard options.preallocation == .off else {
            throw IncomingDisk.needsSpool(
                "a disk whose length is not known yet cannot be preallocated", stream.name)
        }
        guard options.dataFile == nil else {
            throw IncomingDisk.needsSpool(
                "a disk whose length is not known yet gets no external data file", stream.name)
        }
        // As large as one cluster of the L1 table allows; it is cut to measure in the end.
        let cluster = options.clusterByteCount
        let perTable = cluster / options.l2EntryByteCount * cluster
        let limit = Limits.virtualByteCount & ~511
        let image = try newImage(on: device, size: min(perTable * (cluster / 8), limit), options)
        let most = min(perTable * (Limits.l1ByteCount / 8), limit)
        let grow = { (end: UInt64) throws(ImageError) in
            guard end > image.size else { return }
            let wanted = max((end + 511) & ~511, min(image.size * 4, most))
            try image.resize(.absolute(wanted), shrinking: false)
        }
        let end: UInt64
        if compresses {
            end = try compress(stream, into: image, grow)
        } else {
            end = try copy(
                stream, to: ImageSink(image, keepsZeros: sparseByteCount == 0),
                unit: image.clusterByteCount, prepare: grow)
        }
        try image.resize(.absolute((end + 511) & ~511), shrinking: true)
        try image.finish()
    }

    private func compress(
        _ stream: RawStream, into image: Image, _ grow: (UInt64) throws(ImageError) -> Void
    ) throws(ImageError) -> UInt64 {
        let writer = try CompressedWriter(
            image, threadCount: threadCount, effort: compressionEffort)
        var end: UInt64 = 0
        do throws(ImageError) {
            try stream.forEachPart(of: Int(image.clusterByteCount)) {
                bytes, offset throws(ImageError) in
                end = offset + UInt64(bytes.count)
                try grow(end)
                try writer.write(UnsafeRawBufferPointer(bytes), at: offset)
            }
        } catch {
            try? writer.finish()
            throw error
        }
        try writer.finish()
        return end
    }
}
