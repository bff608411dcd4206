internal import CFuse3
internal import Glibc
internal import Logging
internal import QCOW2

/// A libfuse session as other threads may have it.
struct SessionHandle: @unchecked Sendable {
    // Sendable: libfuse's notifications may be sent from any thread.
    let pointer: OpaquePointer
}

/// A FUSE session that shows one catalogue.
///
/// The context lies at a fixed address: it is what libfuse hands back with every request.
struct Session: ~Copyable {
    private let handle: OpaquePointer
    private let context: UnsafeMutablePointer<MountContext>

    init(_ context: consuming MountContext, options: MountOptions) throws(MountError) {
        LibraryLog.capture()
        let source = context.catalogue.source
        let address = UnsafeMutablePointer<MountContext>.allocate(capacity: 1)
        address.initialize(to: context)
        let words = ["qcowfs", "-o", MountWords.forLibrary(source: source, options: options)]
        guard let handle = Self.open(words, address) else {
            address.deinitialize(count: 1)
            address.deallocate()
            throw MountError("", LibraryLog.taken() ?? "libfuse refuses its options")
        }
        self.handle = handle
        self.context = address
    }

    private static func open(
        _ words: [String], _ context: UnsafeMutablePointer<MountContext>
    ) -> OpaquePointer? {
        var operations = fuse_lowlevel_ops.answered
        var pointers: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) }
        defer { pointers.forEach { free($0) } }
        return pointers.withUnsafeMutableBufferPointer { pointers in
            var arguments = fuse_args(
                argc: Int32(pointers.count), argv: pointers.baseAddress, allocated: 0)
            defer { fuse_opt_free_args(&arguments) }
            return qcowfs_session_new(
                &arguments, &operations, MemoryLayout<fuse_lowlevel_ops>.size, context)
        }
    }

    var shared: SessionHandle { SessionHandle(pointer: handle) }

    /// Mounts at an absolute path.
    borrowing func mount(at mountpoint: String, options: MountOptions) throws(MountError) {
        try Requirements.check(options, mountpoint: mountpoint)
        let (status, said) = LibraryLog.listening { fuse_session_mount(handle, mountpoint) }
        guard status == 0 else {
            throw MountError(mountpoint, Requirements.explain(said ?? "libfuse could not mount"))
        }
    }

    /// Answers requests until the file system is unmounted.
    borrowing func serve(threadCount: Int) throws(MountError) {
        let configuration = fuse_loop_cfg_create()
        defer { fuse_loop_cfg_destroy(configuration) }
        let count = UInt32(clamping: threadCount)
        fuse_loop_cfg_set_max_threads(configuration, count)
        // Threads that come and go with each burst cost four to eight times the speed.
        fuse_loop_cfg_set_idle_threads(configuration, count)
        fuse_loop_cfg_set_clone_fd(configuration, 0)
        let status = qcowfs_session_loop_mt(handle, configuration)
        guard status >= 0 else { throw MountError("", SystemError(code: -status)) }
    }

    /// Unmounts what was mounted but never served.
    borrowing func giveUp() { fuse_session_unmount(handle) }

    deinit {
        fuse_session_destroy(handle)
        context.deinitialize(count: 1)
        context.deallocate()
    }
}

/// The options in the form libfuse takes them.
enum MountWords {
    static func forLibrary(source: String, options: MountOptions) -> String {
        var words = ["subtype=qcowfs", "default_permissions", "fsname=" + escaped(source)]
        switch options.visibility {
        case .owner: break
        case .everybody: words.append("allow_other")
        case .ownerAndRoot: words.append("allow_root")
        }
        if options.isReadOnly || options.forcesShare { words.append("ro") }
        return words.joined(separator: ",")
    }

    /// Commas and backslashes stand behind a backslash in an option's value.
    private static func escaped(_ value: String) -> String {
        value.reduce(into: "") { text, character in
            if character == "," || character == "\\" { text.append("\\") }
            text.append(character)
        }
    }
}
