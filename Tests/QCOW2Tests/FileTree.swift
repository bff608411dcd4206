import Glibc
import Testing

/// A directory tree of the test's own, removed at the end.
final class FileTree {
    let path: String

    init() throws {
        var template = Array("/tmp/qcow2-tests-XXXXXX".utf8CString)
        try #require(mkdtemp(&template) != nil)
        let resolved = try #require(realpath(template, nil))
        defer { free(resolved) }
        path = String(cString: resolved)
    }

    deinit { Self.remove(path) }

    func file(_ name: String, _ bytes: [UInt8] = []) throws -> String {
        let path = "\(self.path)/\(name)"
        let descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0o600)
        try #require(descriptor >= 0)
        defer { close(descriptor) }
        try #require(write(descriptor, bytes, bytes.count) == bytes.count)
        return path
    }

    func directory(_ name: String) throws -> String {
        let path = "\(self.path)/\(name)"
        try #require(mkdir(path, 0o700) == 0)
        return path
    }

    private static func remove(_ path: String) {
        if let stream = opendir(path) {
            while let entry = readdir(stream) {
                let name = withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                    String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
                }
                if name == "." || name == ".." { continue }
                var status = stat()
                let child = "\(path)/\(name)"
                lstat(child, &status)
                if status.st_mode & S_IFMT == S_IFDIR { remove(child) } else { unlink(child) }
            }
            closedir(stream)
        }
        rmdir(path)
    }
}
