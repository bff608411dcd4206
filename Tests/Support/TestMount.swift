package import Foundation

/// A mount made by the program under test, gone when the test lets go of it, failed or not.
package final class TestMount: @unchecked Sendable {
    package let mountpoint: String
    /// What was mounted, the first of them where there are several.
    package let image: String
    private var isMounted = true

    /// Mounts `image` on a new directory in `directory`, or on `mountpoint`.
    package convenience init(
        _ image: String, in directory: TemporaryDirectory, options: [String] = []
    ) throws {
        let mountpoint = directory.file("mnt")
        if mkdir(mountpoint, 0o755) != 0, errno != EEXIST {
            throw CallError(call: "mkdir \(mountpoint)", code: errno)
        }
        try self.init([image], on: mountpoint, options: options)
    }

    package init(_ images: [String], on mountpoint: String, options: [String] = []) throws {
        self.mountpoint = mountpoint
        image = images[0]
        try Command.require(
            [TestEnvironment.program, "mount"] + options + images + [mountpoint], timeout: 30)
    }

    /// Takes care of a mount that something else has made.
    package init(existing image: String, on mountpoint: String) {
        (self.mountpoint, self.image) = (mountpoint, image)
    }

    /// The raw file of the first image.
    package var disk: String { mountpoint + "/" + Self.diskName(of: image) }

    package static func diskName(of image: String) -> String {
        var name = String(image.split(separator: "/").last ?? "")
        for suffix in [".qcow2", ".qcow", ".img"] where name.hasSuffix(suffix) {
            name.removeLast(suffix.count)
            break
        }
        return name + ".raw"
    }

    package func open(_ flags: Int32 = O_RDWR) throws -> TestFile { try TestFile(disk, flags) }

    /// Unmounts with the program under test and returns when the image is free.
    package func unmount() throws {
        try Command.require(TestEnvironment.program, "umount", mountpoint, timeout: 60)
        isMounted = false
    }

    /// For a test that has unmounted by other means.
    package func wasUnmounted() { isMounted = false }

    /// The daemon's process id: the one whose command line names the mountpoint.
    package func daemon() throws -> pid_t {
        let pids = TestMount.daemons(naming: mountpoint)
        guard pids.count == 1, let pid = pids.first else {
            throw Command.Failure(
                description: "\(pids.count) daemons name \(mountpoint) in their command line")
        }
        return pid
    }

    /// The qcowfs processes whose command line names `mountpoint`.
    package static func daemons(naming mountpoint: String) -> [pid_t] {
        let entries = (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? []
        return entries.compactMap { pid_t($0) }.filter { pid in
            guard let line = FileManager.default.contents(atPath: "/proc/\(pid)/cmdline") else {
                return false
            }
            let words = line.split(separator: 0).map { String(decoding: $0, as: UTF8.self) }
            return (words.first ?? "").hasSuffix("qcowfs") && words.contains(mountpoint)
        }
    }

    package static func isMountpoint(_ path: String) -> Bool {
        let table = (try? String(contentsOfFile: "/proc/self/mounts", encoding: .utf8)) ?? ""
        return table.split(separator: "\n").contains {
            $0.split(separator: " ").dropFirst().first.map(String.init) == path
        }
    }

    deinit {
        guard isMounted else { return }
        // The test has failed or is about to: what matters is that nothing stays behind.
        let result = try? Command.run(
            [TestEnvironment.program, "umount", mountpoint], timeout: 20)
        if result?.status != 0, TestMount.isMountpoint(mountpoint) {
            _ = try? Command.run(["umount", "-l", mountpoint])
            for pid in TestMount.daemons(naming: mountpoint) { kill(pid, SIGKILL) }
        }
    }
}
