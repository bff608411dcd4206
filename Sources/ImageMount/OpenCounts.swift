/// How the handles that are open on one file may use the kernel's page cache.
///
/// Direct and cached handles are never open together: a direct write would pass by the pages that a
/// cached reader keeps, and on older kernels nothing throws those away.  Whoever opens first decides,
/// and until the last handle is closed everybody else follows.
package struct OpenCounts: Sendable, Equatable {
    package enum Mode: Sendable {
        /// Through the page cache, which stays valid from one open to the next.
        case cached
        /// Past the page cache, writers side by side.
        case direct
    }

    /// Handles of clients.
    package private(set) var handleCount = 0
    /// Those of them that may write.
    package private(set) var writerCount = 0
    package private(set) var mode = Mode.cached

    package init() {}

    /// Counts a new handle and says how it uses the cache.
    ///
    /// - Parameter prefersDirect: the client opened for writing with O_DIRECT.
    package mutating func admit(isWriter: Bool, prefersDirect: Bool) -> Mode {
        if handleCount == 0 { mode = prefersDirect ? .direct : .cached }
        handleCount += 1
        if isWriter { writerCount += 1 }
        return mode
    }

    package mutating func leave(isWriter: Bool) {
        handleCount -= 1
        if isWriter { writerCount -= 1 }
    }
}
