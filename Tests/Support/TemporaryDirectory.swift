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

    deinit { try? FileManager.default.removeItem(atPath: path) }

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
