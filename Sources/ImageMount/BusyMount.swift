internal import Glibc

/// Who keeps a mount busy.
enum BusyMount {
    /// A clause that names the first ones found, with the way out; nil where nobody can be seen.
    static func users(of mountpoint: String) -> String? {
        let found = loopDevices(on: mountpoint) + mounts(on: mountpoint) + processes(in: mountpoint)
        guard !found.isEmpty else { return nil }
        let more = found.count > 4 ? " and \(found.count - 4) more" : ""
        return found.prefix(4).joined(separator: ", ") + more
    }

    private static func loopDevices(on mountpoint: String) -> [String] {
        TextFile.names(in: "/sys/block").filter { $0.hasPrefix("loop") }.sorted().compactMap {
            name in
            guard let file = TextFile.contents(of: "/sys/block/\(name)/loop/backing_file"),
                lies(String(file.dropLast()), in: mountpoint)
            else { return nil }
            return "/dev/\(name) (losetup -d /dev/\(name))"
        }
    }

    private static func mounts(on mountpoint: String) -> [String] {
        MountTable.entries().filter {
            $0.mountpoint != mountpoint && lies($0.mountpoint, in: mountpoint)
        }
        .map { "the mount at \($0.mountpoint) (umount \($0.mountpoint))" }
    }

    private static func processes(in mountpoint: String) -> [String] {
        TextFile.names(in: "/proc").compactMap { Int32($0) }.sorted().compactMap { process in
            guard process != getpid(), uses(process, mountpoint) else { return nil }
            let name = TextFile.contents(of: "/proc/\(process)/comm")?.dropLast()
            return "process \(process)" + (name.map { " (\($0))" } ?? "")
        }
    }

    /// Looks at names only: asking for more would ask the daemon, which may be the one who looks.
    private static func uses(_ process: Int32, _ mountpoint: String) -> Bool {
        let folder = "/proc/\(process)"
        let links =
            ["\(folder)/cwd", "\(folder)/root"]
            + TextFile.names(in: "\(folder)/fd").map { "\(folder)/fd/\($0)" }
        if links.contains(where: { TextFile.link($0).map { lies($0, in: mountpoint) } ?? false }) {
            return true
        }
        let maps = TextFile.contents(of: "\(folder)/maps") ?? ""
        return maps.split(separator: "\n").contains { line in
            guard let slash = line.firstIndex(of: "/") else { return false }
            return lies(String(line[slash...]), in: mountpoint)
        }
    }

    private static func lies(_ path: String, in mountpoint: String) -> Bool {
        path == mountpoint || path.hasPrefix(mountpoint + "/")
    }
}
