/// Copies a whole disk into a new file.
public struct Conversion: Sendable {
    /// What the new file is.
    public enum Target: Sendable {
        /// The bytes of the disk and nothing else, holes included.
        case raw
        /// An image without a backing file, made with these options.
        case qcow2(CreateOptions)
    }

    /// What is made.
    public var target: Target
    /// Runs of zeros of this many bytes become holes; 0 writes them out.  A qcow2 image leaves
    /// whole clusters out, whatever this says, unless it is 0.
    public var sparseByteCount: UInt64 = 4096
    /// Threads that copy, or compress.
    public var threadCount = 2
    /// Whether the clusters of a qcow2 image are compressed.
    public var compresses = false
    /// How much time it may take to compress them.
    public var compressionEffort = CompressionEffort.usual

    /// A conversion with the defaults of `qemu-img convert`.
    public init(to target: Target) { self.target = target }

    /// Copies `source` to a new file at `path`, which takes its place only when it is complete and
    /// durable, and so does its external data file: whatever was there stays as it was until then.
    ///
    /// - Parameters:
    ///   - source: The disk to copy.
    ///   - path: What the new file is called.
    ///   - progress: Told what part is done; false cancels.
    /// - Throws: what reading and writing throw; `.cancelled`; `.locked` where a program uses the
    ///   file that is there.
    public func run(
        from source: SourceDisk, toFileAt path: String, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        try checkOptions(path)
        let files = try newFiles(at: path)
        try run(
            from: source, to: files.device, dataFile: files.dataDevice, progress: progress)
        try files.commit()
    }

    func newFiles(at path: String) throws(ImageError) -> NewImageFiles {
        switch target {
        case .raw: return try NewImageFiles(at: path, CreateOptions())
        case .qcow2(let options):
            // Refused before a file is made.
            try options.check(file: path)
            return try NewImageFiles(at: path, options)
        }
    }

    /// Whether what is at `path` is a disk that is written itself, because no file can replace it.
    package static func writesInPlace(_ path: String) -> Bool {
        do throws(ImageError) {
            let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
            defer { device.close() }
            return device.isDisk
        } catch {
            return false
        }
    }

    /// Copies `source` onto `device`, whose content is lost.
    /// - Parameters:
    ///   - source: The disk to copy.
    ///   - device: What the new file is written to.
    ///   - dataFile: Where guest data shall lie if the options name an external data file; what it
    ///     has is lost.
    ///   - progress: Told what part is done; false cancels.
    /// - Throws: What reading and writing throw; `.cancelled`.
    public func run(
        from source: SourceDisk, to device: any BlockDevice, dataFile: (any BlockDevice)? = nil,
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        // What is shared has the source's holes, and its bytes as they are.
        let shared =
            compresses || sparseByteCount == 0
            ? nil : try SharedSpace(from: source, with: dataFile ?? device)
        switch target {
        case .raw:
            let sink = try RawSink(
                device, size: source.size, keepsZeros: sparseByteCount == 0, sharing: shared)
            try copy(source, to: sink, unit: max(sparseByteCount, 512), progress)
        case .qcow2(let options):
            let image = try newImage(
                on: device, dataFile: dataFile, size: source.size, options)
            if compresses {
                try compress(source, into: image, progress)
            } else {
                try copy(
                    source,
                    to: ImageSink(image, keepsZeros: sparseByteCount == 0, sharing: shared),
                    unit: image.clusterByteCount, progress)
            }
            // The device is its owner's.
            try image.finish()
        }
        try source.finish()
    }

    /// An empty image, open for writing.
    func newImage(
        on device: any BlockDevice, dataFile: (any BlockDevice)? = nil, size: UInt64,
        _ options: CreateOptions
    ) throws(ImageError) -> Image {
        try Image.create(on: device, size: size, options: options, dataFile: dataFile)
        let passphrases = PassphraseSource([options.encryption?.passphrase].compactMap { $0 })
        return try Image.open(
            device, dataFile: dataFile,
            options: OpenOptions(cacheByteCount: Self.cacheByteCount, passphrases: passphrases))
    }

    func checkOptions(_ path: String) throws(ImageError) {
        guard sparseByteCount == 0 || sparseByteCount & (sparseByteCount &- 1) == 0,
            sparseByteCount == 0 || sparseByteCount >= 512
        else {
            throw ImageError(
                .invalidArgument("runs of zeros must be a power of two of at least 512 bytes"),
                file: path)
        }
    }

    /// Tables are written front to back: a few are enough.
    private static let cacheByteCount = 8 << 20

    /// Gives every cluster that is no hole to the threads that compress.
    private func compress(
        _ source: SourceDisk, into image: Image, _ progress: ((Double) -> Bool)?
    ) throws(ImageError) {
        let writer = try CompressedWriter(
            image, threadCount: threadCount, effort: compressionEffort)
        do throws(ImageError) {
            try feed(source, to: writer, clusterByteCount: image.clusterByteCount, progress)
        } catch {
            try? writer.finish()
            throw error
        }
        try writer.finish()
    }

    private func feed(
        _ source: SourceDisk, to writer: CompressedWriter, clusterByteCount: UInt64,
        _ progress: ((Double) -> Bool)?
    ) throws(ImageError) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Int(clusterByteCount), alignment: 4096)
        defer { buffer.deallocate() }
        var known = KnownRun()
        var offset: UInt64 = 0
        while offset < source.size {
            let run = try known.run(of: source, at: offset)
            let end = offset &+ run.byteCount
            let wholeEnd = end == source.size ? end : end & ~(clusterByteCount &- 1)
            if run.isHole, wholeEnd > offset {
                offset = wholeEnd
            } else {
                let count = min(clusterByteCount, source.size &- offset)
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(count)])
                try source.read(into: part, at: offset)
                try writer.write(UnsafeRawBufferPointer(part), at: offset)
                offset &+= count
            }
            if let progress, !progress(Double(offset) / Double(source.size)) {
                throw ImageError(.cancelled, file: "")
            }
        }
    }

    private func copy(
        _ source: SourceDisk, to sink: some DiskSink, unit: UInt64,
        _ progress: ((Double) -> Bool)?
    ) throws(ImageError) {
        // Whole clusters, as long as one is.
        let partByteCount = max(DiskWalk.pieceByteCount, min(unit, 2 << 20))
        // What need not be read costs the same however long it is.
        let pieceByteCount = sink.adopts ? Self.adoptedByteCount : partByteCount
        try DiskWalk(over: [source], pieceByteCount: pieceByteCount).run(
            threadCount: threadCount, bufferByteCount: Int(partByteCount), progress: progress
        ) { piece, buffer throws(ImageError) in
            if piece.isHole { return try sink.zero(piece.range) }
            var rest = piece.range
            while !rest.isEmpty {
                let adopted = try sink.adopt(rest)
                rest = rest.lowerBound &+ adopted..<rest.upperBound
                if adopted > 0 { continue }
                let end = (rest.lowerBound | (partByteCount &- 1)) &+ 1
                let part = rest.clamped(to: rest.lowerBound..<end)
                let bytes = UnsafeMutableRawBufferPointer(
                    rebasing: buffer[..<Int(part.upperBound &- part.lowerBound)])
                try source.read(into: bytes, at: part.lowerBound)
                try Self.store(
                    UnsafeRawBufferPointer(bytes), at: part.lowerBound, in: sink, unit: unit)
                rest = part.upperBound..<rest.upperBound
            }
        }
    }

    /// Bytes of the longest piece that is shared with the source.
    private static let adoptedByteCount: UInt64 = 64 << 20

    /// Writes what is not zero.
    static func store(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64, in sink: some DiskSink, unit: UInt64
    ) throws(ImageError) {
        var done = 0
        while done < bytes.count {
            let run = ZeroScan.run(in: bytes, from: done, at: offset, unitByteCount: unit)
            let place = offset &+ UInt64(done)
            if run.isZero {
                try sink.zero(place..<offset &+ UInt64(run.end))
            } else {
                try sink.write(UnsafeRawBufferPointer(rebasing: bytes[done..<run.end]), at: place)
            }
            done = run.end
        }
    }
}
