internal import Foundation

/// A directory of a test's own, removed with all that is in it when the test lets go of it.
package final class TemporaryDirectory: Sendable {
    package let path: String

    /// `parent`: where it lies; in memory by default.
    package init(in parent: String = TestEnvironment.scratch) throws {
        var template = Array((parent + "/qcowfs-test-XXXXXX").utf8CString)
        guard mkdtemp(&template) != nil else {
            throw CallError(call: "mkdtemp in \(parent)", code: errno)
        }
        path = String(decoding: template.dropLast().map(UInt8.init(bitPattern:)), as: UTF8.self)
    }

    deinit {
        // A test's fields go in the order of their declaration: its mounts may still be there.
        for mountpoint in mountpoints.reversed() { _ = try? Command.run(["umount", mountpoint]) }
        try? FileManager.default.removeItem(atPath: path)
    }

    /// What is mounted in it, in the order of the mounts.
    private var mountpoints: [String] {
        let mounts = (try? String(contentsOfFile: "/proc/self/mountinfo", encoding: .utf8)) ?? ""
        return mounts.split(separator: "\n").map { String($0.split(separator: " ")[4]) }
            .filter { $0.hasPrefix(path + "/") }
    }

    package func file(_ name: String) -> String { path + "/" + name }

    /// The path of a new, empty directory in this one.
    package func directory(_ name: String) throws -> String {
        guard mkdir(file(name), 0o755) == 0 else {
            throw CallError(call: "mkdir \(file(name))", code: errno)
        }
        return file(name)
    }

    package func write(_ bytes: [UInt8], to name: String) throws -> String {
        let file = try TestFile(file(name), O_WRONLY | O_CREAT | O_TRUNC)
        try file.write(bytes, at: 0)
        return file.path
    }
}
