internal import Glibc
internal import QCOW2

/// Paths as the kernel's tables have them.
enum Paths {
    /// The absolute path behind `path`, links resolved.
    static func resolved(_ path: String) throws(SystemError) -> String {
        guard let real = realpath(path, nil) else { throw .last }
        defer { free(real) }
        return String(cString: real)
    }

    /// As `resolved`, but without touching the last component: what is mounted there may be dead.
    static func resolvedExceptLast(_ path: String) throws(SystemError) -> String {
        var trimmed = path[...]
        while trimmed.count > 1, trimmed.hasSuffix("/") { trimmed = trimmed.dropLast() }
        guard let slash = trimmed.lastIndex(of: "/") else {
            return join(try resolved("."), String(trimmed))
        }
        let parent = slash == trimmed.startIndex ? "/" : String(trimmed[..<slash])
        return join(try resolved(parent), String(trimmed[trimmed.index(after: slash)...]))
    }

    private static func join(_ directory: String, _ name: String) -> String {
        if name.isEmpty || name == "." { return directory }
        return directory == "/" ? "/" + name : directory + "/" + name
    }

    /// The directory that a file lies in.
    static func directory(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }
}
