internal import Foundation

/// A loop device over a file, or over a part of it, detached when the test lets go of it.
package final class LoopDevice: @unchecked Sendable {
    package let path: String
    private var isAttached = true

    package init(_ file: String, offset: Int = 0, byteCount: Int? = nil) throws {
        var words = ["losetup", "--find", "--show", "--offset", "\(offset)"]
        if let byteCount { words += ["--sizelimit", "\(byteCount)"] }
        path = try Command.require(words + [file])
            .trimmingCharacters(in: .whitespacesAndNewlines)
    }

    package func detach() throws {
        try Command.require("losetup", "--detach", path)
        isAttached = false
        // The kernel detaches when the last user has gone, which may be a moment later.
        for _ in 0..<200 where isBound { usleep(10_000) }
    }

    private var isBound: Bool {
        FileManager.default.fileExists(
            atPath: "/sys/block/" + path.split(separator: "/").last! + "/loop/backing_file")
    }

    deinit { if isAttached { _ = try? Command.run(["losetup", "--detach", path]) } }
}

/// A file system mounted from a device, unmounted when the test lets go of it.
package final class FileSystemMount: @unchecked Sendable {
    package let path: String
    private var isMounted = true

    package init(_ device: String, on path: String, options: String = "defaults") throws {
        self.path = path
        if mkdir(path, 0o755) != 0, errno != EEXIST {
            throw CallError(call: "mkdir \(path)", code: errno)
        }
        try Command.require("mount", "-o", options, device, path)
    }

    package func unmount() throws {
        try Command.require("umount", path)
        isMounted = false
    }

    deinit {
        if isMounted, (try? Command.run(["umount", path]))?.status != 0 {
            _ = try? Command.run(["umount", "-l", path])
        }
    }
}
