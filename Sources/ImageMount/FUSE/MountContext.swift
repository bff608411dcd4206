internal import CFuse3
internal import Glibc
internal import Logging
internal import Synchronization

/// What every request finds behind the session: the files, and how they look.
///
/// Lies at a fixed address while the session lives; libfuse hands the address back with each
/// request.
struct MountContext: ~Copyable, Sendable {
    let catalogue: Catalogue
    /// The file that is the mountpoint itself; nil where that is a directory.
    let rootFile: NodeAddress?
    let appearance: Appearance
    let isReadOnly: Bool
    let writesBack: Bool
    let scratch: Scratch.Key
    let ownAccess: OwnAccess
    let kernel = KernelVersion()
    let counters: CountersAddress
    /// Trouble with the kernel's side, each told once.
    let log: TroubleLog

    init(
        catalogue: Catalogue, options: MountOptions, scratch: Scratch.Key, ownAccess: OwnAccess,
        counters: CountersAddress
    ) {
        self.catalogue = catalogue
        rootFile = catalogue.rootFile
        appearance = Appearance(options: options)
        isReadOnly = options.isReadOnly || options.forcesShare
        writesBack = options.writesBack
        self.scratch = scratch
        self.ownAccess = ownAccess
        self.counters = counters
        log = TroubleLog(options.logger)
    }

    /// The file that the kernel calls `number`; nil for the root of a directory.
    ///
    /// The kernel only knows numbers that a look-up gave it: addresses of nodes, which stay.
    @inline(__always)
    func node(_ number: fuse_ino_t) -> UnsafeMutablePointer<FileNode>? {
        if number == fuse_ino_t(FUSE_ROOT_ID) { return rootFile?.pointer }
        return UnsafeMutablePointer(bitPattern: UInt(number))
    }

    /// By which number the kernel calls a file.
    func number(of node: UnsafeMutablePointer<FileNode>) -> fuse_ino_t {
        rootFile == nil ? fuse_ino_t(UInt(bitPattern: node)) : fuse_ino_t(FUSE_ROOT_ID)
    }

    /// Seconds for which the kernel may believe a name.  Nobody but this daemon changes the files
    /// it was given; those of a mirrored directory come and go, and so do snapshots.
    var nameValidity: Double { catalogue.changesByItself ? 1 : 86400 }

    /// Seconds for which the kernel may believe attributes: blocks and times move by themselves,
    /// with the first count and with commits in the background.
    var attributeValidity: Double { 1 }
}

/// Whose the files are, and who may do what with them.
struct Appearance: Sendable {
    let owner: uid_t
    let group: gid_t
    let fileMode: mode_t
    let directoryMode: mode_t
    /// When the directory was made: at the mount.
    let since: timespec

    init(options: MountOptions) {
        owner = options.owner ?? getuid()
        group = options.group ?? getgid()
        let isReadOnly = options.isReadOnly || options.forcesShare
        if let umask = options.umask {
            fileMode = (isReadOnly ? 0o444 : 0o666) & ~umask
            directoryMode = (isReadOnly ? 0o555 : 0o777) & ~umask
        } else {
            fileMode = isReadOnly ? 0o400 : 0o600
            directoryMode = isReadOnly ? 0o500 : 0o700
        }
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        since = now
    }

    /// What `stat` tells of the mounted directory.
    var directory: stat {
        var status = stat()
        status.st_ino = ino_t(FUSE_ROOT_ID)
        status.st_mode = S_IFDIR | directoryMode
        status.st_nlink = 2
        status.st_uid = owner
        status.st_gid = group
        (status.st_atim, status.st_mtim, status.st_ctim) = (since, since, since)
        return status
    }

    /// What `stat` tells of a file with these attributes.  A snapshot's is no other: whoever opens
    /// one for writing shall hear that it is read-only, not that it is somebody else's.
    func file(
        _ attributes: ImageAttributes, inodeNumber: UInt64
    ) -> stat {
        var status = stat()
        status.st_ino = ino_t(inodeNumber)
        status.st_mode = S_IFREG | fileMode
        status.st_nlink = 1
        status.st_uid = owner
        status.st_gid = group
        status.st_size = off_t(clamping: attributes.size)
        status.st_blocks = blkcnt_t(clamping: attributes.blockCount)
        status.st_blksize = blksize_t(clamping: attributes.preferredByteCount)
        status.st_atim = attributes.times?.access ?? since
        status.st_mtim = attributes.times?.modification ?? since
        status.st_ctim = attributes.times?.change ?? since
        return status
    }
}
