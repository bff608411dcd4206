internal import Glibc

/// One line of the kernel's mount table.
package struct MountEntry: Sendable, Equatable {
    /// The mounted file system's number, as `0:57`.
    package var device: String
    package var mountpoint: String
    package var type: String
    /// For a mount of ours, what it shows.
    package var source: String
    package var options: [String]

    package var isOurs: Bool { type == "fuse.qcowfs" }
    package var isReadOnly: Bool { options.contains("ro") }

    /// A file system's number in the words of the mount table.
    static func device(_ number: dev_t) -> String {
        let number = UInt64(number)
        let major = (number >> 8) & 0xfff | (number >> 32) & ~0xfff
        let minor = number & 0xff | (number >> 12) & ~0xff
        return "\(major):\(minor)"
    }

    /// The user who mounted a FUSE file system.
    package var userID: UInt32? {
        options.lazy.compactMap { $0.hasPrefix("user_id=") ? UInt32($0.dropFirst(8)) : nil }.first
    }
}

/// The kernel's mount table as a process sees it.
package enum MountTable {
    /// The mounts there are, oldest first.
    package static func entries(ofProcess process: String = "self") -> [MountEntry] {
        guard let text = TextFile.contents(of: "/proc/\(process)/mountinfo") else { return [] }
        return text.split(separator: "\n").compactMap { entry(String($0)) }
    }

    /// Reads `36 35 98:0 /root /mountpoint options [more] - type source options`.
    package static func entry(_ line: String) -> MountEntry? {
        let fields = line.split(separator: " ").map(String.init)
        guard let dash = fields.dropFirst(6).firstIndex(of: "-"), fields.count > dash + 3 else {
            return nil
        }
        return MountEntry(
            device: fields[2], mountpoint: unescaped(fields[4]), type: fields[dash + 1],
            source: unescaped(fields[dash + 2]),
            options: (fields[5] + "," + fields[dash + 3]).split(separator: ",").map(String.init))
    }

    /// The mount on top at an absolute path.
    package static func entry(at mountpoint: String) -> MountEntry? {
        entries().last { $0.mountpoint == mountpoint }
    }

    /// `\040` and its like, as the kernel and fstab write blanks, back into what they stand for.
    package static func unescaped(_ text: String) -> String {
        guard text.contains("\\") else { return text }
        var bytes: [UInt8] = []
        var rest = Array(text.utf8)[...]
        while let byte = rest.popFirst() {
            let digits = rest.prefix(3)
            if byte == UInt8(ascii: "\\"), digits.count == 3,
                let value = UInt8(String(decoding: digits, as: UTF8.self), radix: 8)
            {
                bytes.append(value)
                rest = rest.dropFirst(3)
            } else {
                bytes.append(byte)
            }
        }
        return String(decoding: bytes, as: UTF8.self)
    }
}
