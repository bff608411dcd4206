/// How the handles that are open on one file use the kernel's page cache.
package struct OpenCounts: Sendable, Equatable {
    package enum Mode: Sendable {
        /// Through the page cache, which stays valid from one open to the next.
        case cached
        /// Past the page cache, writers side by side.
        case direct
    }

    package private(set) var cachedHandleCount = 0
    private var directHandleCount = 0
    /// Handles by which pages of the cache can become dirty: reads past the cache must not miss
    /// them.
    package private(set) var cachedWriterCount = 0

    package init() {}

    package var handleCount: Int { cachedHandleCount + directHandleCount }

    /// Counts a new handle and says how it uses the cache.
    ///
    /// - Parameter prefersDirect: the client opened for writing with O_DIRECT.
    package mutating func admit(isWriter: Bool, prefersDirect: Bool) -> Mode {
        if prefersDirect, cachedWriterCount == 0 {
            directHandleCount += 1
            return .direct
        }
        cachedHandleCount += 1
        if isWriter { cachedWriterCount += 1 }
        return .cached
    }

    /// Counts a handle out, with what was said when it was admitted.
    package mutating func leave(isWriter: Bool, mode: Mode) {
        switch mode {
        case .direct: directHandleCount -= 1
        case .cached:
            cachedHandleCount -= 1
            if isWriter { cachedWriterCount -= 1 }
        }
    }
}
