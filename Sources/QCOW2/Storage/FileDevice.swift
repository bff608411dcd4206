internal import Glibc
private import Synchronization

/// A regular file or a block device.
///
/// The file is open from the initializer to `close()`, always through the same descriptor, because
/// the locks of `ImageLock` belong to it.
public final class FileDevice: BlockDevice {
    /// What the file is opened for.
    public enum Access: Sendable {
        /// Reading (`O_RDONLY`).
        case readOnly
        /// Reading and writing (`O_RDWR`).
        case readWrite
    }

    /// What tells one file from another, whatever its names are.
    package struct Identity: Hashable, Sendable {
        let device: UInt64
        let inode: UInt64

        init(_ status: stat) {
            device = UInt64(truncatingIfNeeded: status.st_dev)
            inode = UInt64(truncatingIfNeeded: status.st_ino)
        }

        /// One word that says which file it is.
        package var word: String { "\(device):\(inode)" }

        /// The file that `path` names, nil where there is none to see.
        package init?(ofFileAt path: String) {
            var status = stat()
            guard stat(path, &status) == 0 else { return nil }
            self.init(status)
        }
    }

    public let name: String
    /// What the file was opened for.
    public let access: Access
    nonisolated(unsafe) public let mappedBytes: UnsafeRawBufferPointer?

    /// The open descriptor, for locks and for calls that this type does not offer.
    package let descriptor: Int32
    package let identity: Identity
    let isBlockDevice: Bool
    /// Whether it is a disk, whose length nobody changes and whose place no other file can take: a
    /// block device, or what a qcowfs shows of an image.
    let isDisk: Bool
    private let bypassesPageCache: Bool
    /// Present when the page cache is bypassed.
    private let direct: DirectTransfer?
    private let isClosed = Atomic(false)

    /// Opens the file at `path`, which has to exist.
    ///
    /// - Parameters:
    ///   - path: Where the file is.
    ///   - access: What it is opened for.
    ///   - bypassesPageCache: Reads and writes go to the disk itself (`O_DIRECT`); requests need
    ///     no alignment.
    ///   - mapsBytes: Whether `mappedBytes` is wanted; it exists only where the file system is
    ///     known to keep it equal to what is written.
    /// - Throws: `.system` with what the system answered, `.invalidArgument` for anything that is
    ///   neither a regular file nor a block device.
    public convenience init(
        path: String, access: Access, bypassesPageCache: Bool = false, mapsBytes: Bool = true
    ) throws(ImageError) {
        try Self.refuseSpecialFile(path)
        // O_NONBLOCK for the case that a FIFO has taken the file's place in the meantime.
        let mode = access == .readWrite ? O_RDWR : O_RDONLY
        let direct = bypassesPageCache ? O_DIRECT : 0
        let descriptor = try Self.attempt("cannot open", path) { () throws(SystemError) in
            try retryingInterrupts { open(path, mode | direct | O_CLOEXEC | O_NONBLOCK | O_NOCTTY) }
        }
        try self.init(
            descriptor, name: path, access: access, bypassesPageCache: bypassesPageCache,
            mapsBytes: mapsBytes)
    }

    /// Makes a new, empty file at `path`.
    /// - Throws: `.system`, also where a file is there already.
    public convenience init(creating path: String) throws(ImageError) {
        let descriptor = try Self.attempt("cannot create", path) { () throws(SystemError) in
            try retryingInterrupts { open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o644) }
        }
        try self.init(
            descriptor, name: path, access: .readWrite, bypassesPageCache: false, mapsBytes: true)
    }

    /// Takes over an open descriptor, which is closed if this throws.
    package init(
        _ descriptor: Int32, name: String, access: Access, bypassesPageCache: Bool, mapsBytes: Bool
    ) throws(ImageError) {
        do throws(ImageError) {
            let status = try Self.judgedStatus(of: descriptor, name: name)
            let isBlockDevice = status.st_mode & S_IFMT == S_IFBLK
            direct =
                bypassesPageCache
                ? try Self.attempt("cannot bypass the page cache", name) { () throws(SystemError) in
                    try DirectTransfer(descriptor, isBlockDevice: isBlockDevice)
                } : nil
            mappedBytes =
                mapsBytes && !bypassesPageCache && !isBlockDevice
                ? Self.mapping(of: descriptor, status) : nil
            self.bypassesPageCache = bypassesPageCache
            identity = Identity(status)
            self.isBlockDevice = isBlockDevice
            isDisk = isBlockDevice || Platform.isShownImage(descriptor, status)
        } catch {
            _ = Glibc.close(descriptor)
            throw error
        }
        self.descriptor = descriptor
        self.name = name
        self.access = access
    }

    deinit { close() }

    /// Closes the file, which drops its locks and its mapping.  Nothing else may be called
    /// meanwhile or afterwards, except `close()`.
    public func close() {
        guard !isClosed.exchange(true, ordering: .acquiringAndReleasing) else { return }
        if let mappedBytes, let address = mappedBytes.baseAddress {
            munmap(UnsafeMutableRawPointer(mutating: address), mappedBytes.count)
        }
        // Errors of writes were reported by `flush`; Linux has released the descriptor in any case.
        _ = Glibc.close(descriptor)
    }

    // MARK: The bytes

    public func byteCount() throws(SystemError) -> UInt64 {
        try Self.byteCount(of: descriptor, isBlockDevice: isBlockDevice)
    }

    /// Bytes that the file takes on its disk.
    package func allocatedByteCount() throws(SystemError) -> UInt64 {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw .last }
        return UInt64(clamping: status.st_blocks) &* 512
    }

    public func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        if bypassesPageCache { return try readDirectly(into: buffer, at: offset) }
        return try readFully(descriptor, into: buffer, at: offset)
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        if bypassesPageCache { return try writeDirectly(bytes, at: offset) }
        try writeFully(descriptor, bytes, at: offset)
    }

    // Apart from the two above, which would count references to `direct` on every call.

    @inline(never)
    private func readDirectly(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        guard let direct else { throw .invalid }
        return try direct.read(into: buffer, at: offset)
    }

    @inline(never)
    private func writeDirectly(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64
    ) throws(SystemError) {
        guard let direct else { throw .invalid }
        try direct.write(bytes, at: offset)
    }

    public func flush() throws(SystemError) {
        _ = try retryingInterrupts { fdatasync(descriptor) }
    }

    public func resize(to byteCount: UInt64) throws(SystemError) {
        if isDisk {
            let fixed = try self.byteCount()
            if byteCount == fixed { return }
            throw byteCount > fixed ? .noSpace : .notSupported
        }
        guard let length = off_t(exactly: byteCount) else { throw SystemError(code: EFBIG) }
        _ = try retryingInterrupts { ftruncate(descriptor, length) }
    }

    // MARK: Holes

    public var readsZerosPastEnd: Bool { !isDisk }

    public func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        do throws(SystemError) {
            try Platform.punchHole(descriptor, range)
        } catch {
            // Block devices say EINVAL to a range that does not fit their sectors.
            throw isBlockDevice && error.code == EINVAL ? .notSupported : error
        }
    }

    public func reserve(_ range: Range<UInt64>) throws(SystemError) {
        try Platform.reserve(descriptor, range)
    }

    public func nextData(from offset: UInt64) throws(SystemError) -> UInt64? {
        let end = try byteCount()
        guard offset < end else { return nil }
        do throws(SystemError) {
            return try seek(from: offset, SEEK_DATA)
        } catch {
            if error.code == ENXIO { return nil }
            if error.code == EINVAL { return offset }
            throw error
        }
    }

    public func nextHole(from offset: UInt64) throws(SystemError) -> UInt64 {
        let end = try byteCount()
        guard offset < end else { return offset }
        do throws(SystemError) {
            return try seek(from: offset, SEEK_HOLE)
        } catch {
            if error.code == ENXIO || error.code == EINVAL { return end }
            throw error
        }
    }

    /// The file's position, which this changes, is used by nobody: reads and writes name theirs.
    private func seek(from offset: UInt64, _ whence: Int32) throws(SystemError) -> UInt64 {
        guard let offset = off_t(exactly: offset) else { throw .invalid }
        return UInt64(try retryingInterrupts { lseek(descriptor, offset, whence) })
    }

    // MARK: Opening

    /// Opening a device can do something by itself (a tape rewinds, a watchdog starts), and opening
    /// a FIFO waits: neither happens for a file that is going to be refused.
    private static func refuseSpecialFile(_ path: String) throws(ImageError) {
        var status = stat()
        let found = stat(path, &status)
        if found != 0 { throw ImageError(.system(.last, operation: "cannot open"), file: path) }
        try judge(status, name: path)
    }

    private static func judgedStatus(
        of descriptor: Int32, name: String
    ) throws(ImageError) -> stat {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else {
            throw ImageError(.system(.last, operation: "cannot examine"), file: name)
        }
        try judge(status, name: name)
        return status
    }

    private static func judge(_ status: stat, name: String) throws(ImageError) {
        let type = status.st_mode & S_IFMT
        guard type != S_IFREG && type != S_IFBLK else { return }
        let word =
            switch type {
            case S_IFDIR: "a directory"
            case S_IFIFO: "a FIFO"
            case S_IFSOCK: "a socket"
            case S_IFCHR: "a character device"
            default: "a special file"
            }
        throw ImageError(
            .invalidArgument("is \(word); an image is a file or a block device"), file: name)
    }

    private static func attempt<Result>(
        _ operation: String, _ name: String, _ body: () throws(SystemError) -> Result
    ) throws(ImageError) -> Result {
        do throws(SystemError) {
            return try body()
        } catch {
            throw ImageError(.system(error, operation: operation), file: name)
        }
    }

    private static func byteCount(
        of descriptor: Int32, isBlockDevice: Bool
    ) throws(SystemError) -> UInt64 {
        if isBlockDevice { return try Platform.blockDeviceByteCount(descriptor) }
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw .last }
        return UInt64(clamping: status.st_size)
    }

    /// One mapping for the life of the device, long enough for the file to grow under it: address
    /// space costs nothing until it is touched.
    private static func mapping(of descriptor: Int32, _ status: stat) -> UnsafeRawBufferPointer? {
        let byteCount = UInt64(clamping: status.st_size)
        guard Platform.mapsCoherently(descriptor) else { return nil }
        if Platform.fillsHolesOfMappings(descriptor) {
            // Reading a sparse image must not fill the memory: some holes, but not many.
            let stored = UInt64(clamping: status.st_blocks) &* 512
            guard byteCount <= max(stored.clampedAdding(stored), stored.clampedAdding(64 << 20))
            else { return nil }
        }
        let pageByteCount: UInt64 = 4096
        let room = min(byteCount.clampedAdding(byteCount).clampedAdding(16 << 30), 1 << 40)
        guard let length = Int(exactly: room / pageByteCount * pageByteCount),
            let address = mmap(nil, length, PROT_READ, MAP_SHARED, descriptor, 0),
            address != MAP_FAILED
        else { return nil }
        return UnsafeRawBufferPointer(start: address, count: length)
    }
}

extension UInt64 {
    /// The sum, or the largest number where it does not fit.
    fileprivate func clampedAdding(_ other: UInt64) -> UInt64 {
        let (sum, overflow) = addingReportingOverflow(other)
        return overflow ? .max : sum
    }
}
