internal import Glibc
internal import Synchronization

/// A disk that an open descriptor brings: standard input, mostly.
public enum IncomingDisk: Sendable {
    /// A disk of known length: an image, or a file whose bytes can be read in any order.
    case disk(SourceDisk)
    /// A raw disk whose length nobody knows before its end.
    case stream(RawStream)

    /// Looks at what `descriptor` brings.
    ///
    /// A file is read as a file.  What comes through a pipe is read once, from front to back: a
    /// raw disk as it is, an image if each L2 table comes before its clusters and these come about
    /// in the disk's order, as `convert` and `qemu-img convert` write them.
    ///
    /// - Parameters:
    ///   - descriptor: What is read; it stays the caller's.
    ///   - options: How an image is opened.
    ///   - name: What messages call it.
    ///   - format: nil takes what begins with the qcow2 magic for an image, all else for raw.
    ///   - snapshot: The internal snapshot that is meant instead; not from a pipe.
    ///   - spoolDirectory: Where a file without a name keeps what a pipe brings, so that it can be
    ///     read in any order.
    ///   - isCancelled: Asked while nothing comes.
    /// - Throws: `.backing` or `.dataFile` for an image that needs other files, `.corrupt` for one
    ///   that ends early, `.cancelled`, and what opening throws.
    public init(
        descriptor: Int32, name: String, format: SourceDisk.Format? = nil,
        snapshot: String? = nil, spoolDirectory: String? = nil,
        options: OpenOptions = OpenOptions(access: .readOnly),
        isCancelled: @escaping @Sendable () -> Bool = { false }
    ) throws(ImageError) {
        var options = options
        options.access = .readOnly
        if let file = try Self.file(descriptor, name) {
            try ImageLock.take(options.locking == .forceShare ? .forceShare : .reader, on: file)
            self = .disk(try Self.disk(on: file, format, snapshot, options))
            return
        }
        let pipe = try PipeDevice(descriptor, name: name, isCancelled: isCancelled)
        if let spoolDirectory {
            let spool = try SpoolFile.make(in: spoolDirectory, name: name)
            try RawStream(pipe).copy(to: spool)
            self = .disk(try Self.disk(on: spool, format, snapshot, options))
            return
        }
        guard try Self.isImage(format, pipe) else {
            if snapshot != nil { throw Self.noSnapshots(name) }
            self = .stream(RawStream(pipe))
            return
        }
        if snapshot != nil { throw Self.needsSpool("a snapshot is not read from a pipe", name) }
        self = .disk(SourceDisk(try PipedImage(pipe, options: options)))
    }

    /// The regular file or block device behind a descriptor that stands at its start.
    private static func file(_ descriptor: Int32, _ name: String) throws(ImageError) -> FileDevice?
    {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else {
            throw ImageError(.system(.last, operation: "cannot examine"), file: name)
        }
        let type = status.st_mode & S_IFMT
        guard type == S_IFREG || type == S_IFBLK, lseek(descriptor, 0, SEEK_CUR) == 0 else {
            return nil
        }
        let copy = fcntl(descriptor, F_DUPFD_CLOEXEC, 3)
        guard copy >= 0 else {
            throw ImageError(.system(.last, operation: "cannot keep"), file: name)
        }
        return try FileDevice(
            copy, name: name, access: .readOnly, bypassesPageCache: false, mapsBytes: false)
    }

    private static func disk(
        on device: FileDevice, _ format: SourceDisk.Format?, _ snapshot: String?,
        _ options: OpenOptions
    ) throws(ImageError) -> SourceDisk {
        guard try isImage(format, device) else {
            if snapshot != nil { throw noSnapshots(device.name) }
            return try SourceDisk(device)
        }
        try Header.readSupported(from: device).checkStandsAlone(device.name)
        let image = try Image.open(device, options: options)
        guard let snapshot else { return SourceDisk(image) }
        let view = try image.openSnapshot(snapshot)
        view.closesParent.store(true, ordering: .relaxed)
        return SourceDisk(view)
    }

    private static func isImage(
        _ format: SourceDisk.Format?, _ device: any BlockDevice
    ) throws(ImageError) -> Bool {
        if let format { return format == .qcow2 }
        do throws(SystemError) {
            return try device.hasMagic()
        } catch {
            // Nothing at all came.
            if error == .missing { return false }
            if error == .cancelled { throw ImageError(.cancelled, file: device.name) }
            throw ImageError(.system(error, operation: "cannot read"), file: device.name)
        }
    }

    private static func noSnapshots(_ name: String) -> ImageError {
        ImageError(.invalidArgument("a raw disk has no snapshots"), file: name)
    }

    static func needsSpool(_ words: String, _ name: String) -> ImageError {
        ImageError(.invalidArgument("\(words): give --spool DIR"), file: name)
    }
}

/// A raw disk that comes through a pipe.
public struct RawStream: Sendable {
    private let pipe: PipeDevice

    init(_ pipe: PipeDevice) {
        self.pipe = pipe
        pipe.narrow()
    }

    var name: String { pipe.name }

    /// Calls `body` with one part after the other, each but the last `byteCount` long.
    func forEachPart(
        of byteCount: Int,
        _ body: (UnsafeMutableRawBufferPointer, _ offset: UInt64) throws(ImageError) -> Void
    ) throws(ImageError) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 4096)
        defer { buffer.deallocate() }
        var offset: UInt64 = 0
        while true {
            let count = try read(into: buffer, at: offset)
            if count > 0 {
                try body(UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]), offset)
            }
            if count < byteCount { return }
            offset += UInt64(count)
        }
    }

    private func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(ImageError) -> Int {
        do throws(SystemError) {
            return try pipe.read(into: buffer, at: offset)
        } catch {
            if error == .missing { return 0 }
            if error == .cancelled { throw ImageError(.cancelled, file: name) }
            throw ImageError(.system(error, operation: "cannot read"), file: name)
        }
    }

    /// Copies everything to a file, zeros as holes.
    func copy(to file: FileDevice) throws(ImageError) {
        let sink = try RawSink(file, size: 0, keepsZeros: false)
        var end: UInt64 = 0
        try forEachPart(of: 1 << 20) { bytes, offset throws(ImageError) in
            try Conversion.store(UnsafeRawBufferPointer(bytes), at: offset, in: sink, unit: 4096)
            end = offset + UInt64(bytes.count)
        }
        try sink.setEnd(end)
    }
}

extension BlockDevice {
    /// Whether the first bytes are those of a qcow2 image.
    func hasMagic() throws(SystemError) -> Bool {
        var start: UInt32 = 0
        let count = try withUnsafeMutableBytes(of: &start) { bytes throws(SystemError) in
            try read(into: bytes, at: 0)
        }
        return count == 4 && UInt32(bigEndian: start) == Header.magic
    }
}

/// A file that has no name and goes when it is closed.
enum SpoolFile {
    static func make(in directory: String, name: String) throws(ImageError) -> FileDevice {
        var descriptor = open(directory, Platform.namelessFile, 0o600)
        if descriptor < 0, errno == EOPNOTSUPP || errno == EISDIR {
            // File systems without such files have some that lose their name at once.
            let suffix = String(UInt64.random(in: 0 ... .max), radix: 36)
            let path = directory + "/.qcowfs-\(suffix).spool"
            descriptor = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
            if descriptor >= 0 { unlink(path) }
        }
        guard descriptor >= 0 else {
            throw ImageError(.system(.last, operation: "cannot make a file"), file: directory)
        }
        return try FileDevice(
            descriptor, name: name, access: .readWrite, bypassesPageCache: false, mapsBytes: false)
    }
}
