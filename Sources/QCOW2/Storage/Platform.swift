internal import CLinux
internal import Glibc

/// What differs from one operating system to another, all in one place.  This is Linux.
enum Platform {
    /// The flags that open a file without a name, in the directory that is opened.  glibc computes
    /// `O_TMPFILE` from a macro that Swift does not see.
    static let namelessFile = O_RDWR | O_CLOEXEC | O_DIRECTORY | 0o20_000_000

    /// Reserves space for `range` without writing to it; the file grows where it has to.
    static func reserve(_ descriptor: Int32, _ range: Range<UInt64>) throws(SystemError) {
        try allocate(descriptor, mode: 0, range)
    }

    /// Gives the space of `range` back and keeps the length.
    static func punchHole(_ descriptor: Int32, _ range: Range<UInt64>) throws(SystemError) {
        try allocate(descriptor, mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range)
    }

    private static func allocate(
        _ descriptor: Int32, mode: Int32, _ range: Range<UInt64>
    ) throws(SystemError) {
        guard let offset = off_t(exactly: range.lowerBound),
            let count = off_t(exactly: range.upperBound - range.lowerBound)
        else { throw SystemError(code: EFBIG) }
        if count == 0 { return }
        do throws(SystemError) {
            _ = try retryingInterrupts { fallocate(descriptor, mode, offset, count) }
        } catch {
            throw error.code == ENOSYS ? .notSupported : error
        }
    }

    /// File systems on which a shared mapping and `write` show the same bytes at any time, by the
    /// numbers of linux/magic.h.  Network and FUSE file systems are not among them.
    private static let coherentFileSystems: Set<UInt> = [
        0xEF53,  // ext2, ext3, ext4
        0x5846_5342,  // xfs
        0x9123_683E,  // btrfs
        0xF2F5_2010,  // f2fs
        0xCA45_1A4E,  // bcachefs
        tmpfs,
        0x8584_58F6,  // ramfs
        0x794C_7630,  // overlayfs, which maps the file below
    ]

    private static let tmpfs: UInt = 0x0102_1994
    private static let fuse: UInt = 0x6573_5546

    /// Whether a file is what a qcowfs shows of an image.
    static func isShownImage(_ descriptor: Int32, _ status: stat) -> Bool {
        guard fileSystem(of: descriptor) == fuse,
            let mounts = fopen("/proc/self/mountinfo", "re")
        else { return false }
        defer { fclose(mounts) }
        // `36 35 MAJOR:MINOR ROOT MOUNTPOINT OPTIONS - TYPE SOURCE OPTIONS`
        let number = UInt64(status.st_dev)
        let major = (number >> 8) & 0xfff | (number >> 32) & ~0xfff
        let device = "\(major):\(number & 0xff | (number >> 12) & ~0xff)"
        var line: UnsafeMutablePointer<CChar>?
        var room = 0
        defer { free(line) }
        while getline(&line, &room, mounts) > 0 {
            guard let line else { break }
            let words = String(cString: line).split(separator: " ")
            guard words.count > 2, words[2] == device, let dash = words.firstIndex(of: "-"),
                dash + 1 < words.count
            else { continue }
            if words[dash + 1] == "fuse.qcowfs" { return true }
        }
        return false
    }

    /// Whether a mapping of this file is known to be coherent with reads and writes.
    static func mapsCoherently(_ descriptor: Int32) -> Bool {
        fileSystem(of: descriptor).map(coherentFileSystems.contains) ?? false
    }

    /// Whether reading a hole through a mapping fills it with memory that stays: tmpfs does that.
    static func fillsHolesOfMappings(_ descriptor: Int32) -> Bool {
        fileSystem(of: descriptor) == tmpfs
    }

    private static func fileSystem(of descriptor: Int32) -> UInt? {
        var system = statfs()
        guard fstatfs(descriptor, &system) == 0 else { return nil }
        return UInt(truncatingIfNeeded: system.f_type)
    }

    // linux/fs.h spells these as macros which Swift does not see.
    private static let cloneRange: UInt = 0x4020_940D  // FICLONERANGE
    private static let getDeviceByteCount: UInt = 0x8008_1272  // BLKGETSIZE64
    private static let getLogicalBlockByteCount: UInt = 0x1268  // BLKSSZGET

    /// The length of a block device in bytes.
    static func blockDeviceByteCount(_ descriptor: Int32) throws(SystemError) -> UInt64 {
        var count: UInt64 = 0
        guard ioctl(descriptor, getDeviceByteCount, &count) == 0 else { throw .last }
        return count
    }

    /// The smallest unit that a block device reads and writes, in bytes.
    static func logicalBlockByteCount(_ descriptor: Int32) throws(SystemError) -> Int {
        var count: Int32 = 0
        guard ioctl(descriptor, getLogicalBlockByteCount, &count) == 0 else { throw .last }
        return Int(count)
    }

    /// Makes bytes of one file those of another, in the same space.
    static func share(
        _ range: Range<UInt64>, of source: Int32, with target: Int32, at offset: UInt64
    ) throws(SystemError) {
        // struct file_clone_range: descriptor, offset and length of the source, then the target's
        // offset.
        var request = (
            Int64(source), range.lowerBound, range.upperBound &- range.lowerBound, offset
        )
        do throws(SystemError) {
            _ = try retryingInterrupts {
                withUnsafeMutablePointer(to: &request) { ioctl(target, cloneRange, $0) }
            }
        } catch {
            switch error.code {
            // Not on this file system, not between these two, or not these bytes of them.
            case EOPNOTSUPP, ENOTTY, ENOSYS, EXDEV, EINVAL, EBADF, EPERM, ETXTBSY:
                throw .notSupported
            default: throw error
            }
        }
    }

    /// The smallest unit in which the file's file system gives out space, in bytes.
    static func blockByteCount(_ descriptor: Int32) -> UInt64? {
        var system = statfs()
        guard fstatfs(descriptor, &system) == 0 else { return nil }
        return UInt64(exactly: system.f_bsize)
    }

    /// Takes (`F_RDLCK`) or drops (`F_UNLCK`) a lock on one byte, for this open file description.
    static func setByteLock(
        _ descriptor: Int32, byte: Int, type: Int32
    ) throws(SystemError) {
        var lock = byteLock(byte, type: type)
        _ = try retryingInterrupts { fcntl(descriptor, F_OFD_SETLK, &lock) }
    }

    /// Whether another open file description has a lock on the byte.
    static func isByteLockedByOthers(_ descriptor: Int32, byte: Int) throws(SystemError) -> Bool {
        // Asking about a write lock finds read locks too; it is never taken.
        var lock = byteLock(byte, type: F_WRLCK)
        _ = try retryingInterrupts { fcntl(descriptor, F_OFD_GETLK, &lock) }
        return lock.l_type != Int16(F_UNLCK)
    }

    private static func byteLock(_ byte: Int, type: Int32) -> flock {
        flock(
            l_type: Int16(type), l_whence: Int16(SEEK_SET), l_start: off_t(byte), l_len: 1,
            l_pid: 0)
    }
}

/// Calls the operating system, again when a signal interrupted it; −1 becomes its `errno`.
@inline(__always)
func retryingInterrupts<Number: SignedInteger>(
    _ call: () -> Number
) throws(SystemError) -> Number {
    while true {
        let answer = call()
        if answer >= 0 { return answer }
        let error = SystemError.last
        if error.code != EINTR { throw error }
    }
}
