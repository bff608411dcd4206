internal import Glibc

/// A program that keeps a file locked, as far as /proc lets us see it.
///
/// The kernel does not tell the owner of such locks, because several processes may share one.  But
/// /proc/PID/fdinfo/N lists the locks of the description behind each descriptor.
package struct LockHolder: Equatable, Sendable, CustomStringConvertible {
    package let program: String
    package let processID: Int32

    package var description: String {
        processID == getpid()
            ? "this process itself (pid \(processID), is it named twice?)"
            : "\(program) (pid \(processID))"
    }

    /// The first process found with a lock on one of `bytes` of the file that `device` has open;
    /// nil where none can be seen, as another user's mostly cannot.
    package static func first(of device: FileDevice, bytes: [Int]) -> LockHolder? {
        for processID in entries(of: "/proc").compactMap({ Int32($0) }).sorted() {
            for descriptor in entries(of: "/proc/\(processID)/fd").compactMap({ Int32($0) }) {
                if processID == getpid() && descriptor == device.descriptor { continue }
                // Only what is locked is looked at: to ask for a file's attributes is to ask who
                // serves it, another mount that hangs for instance.
                guard holdsLock(descriptor, of: processID, on: bytes),
                    isOpen(descriptor, of: processID, on: device.identity)
                else { continue }
                return LockHolder(program: name(of: processID), processID: processID)
            }
        }
        return nil
    }

    private static func isOpen(
        _ descriptor: Int32, of processID: Int32, on identity: FileDevice.Identity
    ) -> Bool {
        var status = stat()
        return stat("/proc/\(processID)/fd/\(descriptor)", &status) == 0
            && FileDevice.Identity(status) == identity
    }

    /// Lines read `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 100`; the last two words are the
    /// first and the last byte, `EOF` for no end.
    private static func holdsLock(
        _ descriptor: Int32, of processID: Int32, on bytes: [Int]
    ) -> Bool {
        for line in text(of: "/proc/\(processID)/fdinfo/\(descriptor)").split(separator: "\n") {
            let words = line.split(whereSeparator: { $0 == " " || $0 == "\t" })
            guard words.first == "lock:", words.count >= 4, let first = Int(words[words.count - 2])
            else { continue }
            let last = Int(words[words.count - 1]) ?? .max
            if bytes.contains(where: { first <= $0 && $0 <= last }) { return true }
        }
        return false
    }

    private static func name(of processID: Int32) -> String {
        let name = text(of: "/proc/\(processID)/comm").split(separator: "\n").first.map(String.init)
        return name ?? "a program"
    }

    private static func entries(of directory: String) -> [String] {
        guard let stream = opendir(directory) else { return [] }
        defer { closedir(stream) }
        var names: [String] = []
        while let entry = readdir(stream) {
            names.append(
                withUnsafeBytes(of: &entry.pointee.d_name) { name in
                    String(decoding: name.prefix { $0 != 0 }, as: UTF8.self)
                })
        }
        return names
    }

    /// The start of a small file of /proc, empty where it cannot be read.
    private static func text(of path: String) -> String {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return "" }
        defer { close(descriptor) }
        return String(unsafeUninitializedCapacity: 16384) { buffer in
            // What cannot be read names no holder, which is all that is lost.
            (try? readFully(descriptor, into: UnsafeMutableRawBufferPointer(buffer), at: 0)) ?? 0
        }
    }
}
