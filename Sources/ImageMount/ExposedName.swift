internal import Glibc

/// What an image's raw file is called in a mounted directory.
package enum ExposedName {
    /// The longest name a file may have, in bytes.
    private static let limit = 255

    /// `NAME.raw` for the image at `path`: its file name without the extensions images have.
    package static func ofImage(at path: String) -> String {
        let file = String(path.split(separator: "/").last ?? "")
        for ending in [".qcow2", ".qcow", ".img"] where file.hasSuffix(ending) {
            if file.utf8.count > ending.utf8.count { return file.dropLast(ending.count) + ".raw" }
        }
        return file + ".raw"
    }

    /// `NAME.raw` for a name that a person chose; nil for one that no file can have.
    package static func chosen(_ name: String) -> String? {
        guard !name.isEmpty, !name.contains("/"), !name.utf8.contains(0) else { return nil }
        let full = name.hasSuffix(".raw") ? name : name + ".raw"
        return isPossible(full) && full != ".raw" ? full : nil
    }

    /// Whether a file can be called `name`.
    package static func isPossible(_ name: String) -> Bool { name.utf8.count <= limit }

    /// A number for `stat`, the same at every mount of a file of this name, never that of the root.
    package static func inodeNumber(of name: String) -> UInt64 {
        // FNV-1a; 48 bits, so that no program that keeps inode numbers in a Double rounds one.
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        for byte in name.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01b3 }
        return (hash >> 16) | (1 << 20)
    }
}
