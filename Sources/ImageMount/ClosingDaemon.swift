internal import Glibc
internal import QCOW2

/// A qcowfs whose mount is gone, and which still writes and closes its images.
enum ClosingDaemon {
    /// What such a process is called; at most 15 bytes.
    static let processName = "qcowfs-closing"

    /// Opens an image, and tries again for up to 10 seconds while a closing daemon has it.
    static func waiting(
        for path: String, _ open: () throws(ImageError) -> Image
    ) throws(MountError) -> Image {
        var isHeld = true
        for _ in 0..<400 {
            do throws(ImageError) {
                return try open()
            } catch {
                // It may have ended since it refused us: then there is one try more.
                guard case .locked = error.kind, isHeld else { throw MountError(error) }
                isHeld = holds(path)
                if isHeld { usleep(25_000) }
            }
        }
        do throws(ImageError) { return try open() } catch { throw MountError(error) }
    }

    /// Waits until no closing daemon has the images of a mount that was taken away.
    static func waitForEnd(of entry: MountEntry, timeout: Double?) throws(MountError) {
        let paths = [entry.source] + entry.source.split(separator: ":").map(String.init)
        let start = OperationCounter.now()
        while paths.contains(where: holds) {
            usleep(10_000)
            let seconds = Double(OperationCounter.now() &- start) / 1e9
            if let timeout, seconds > timeout {
                throw MountError(entry.mountpoint, "unmounted, but its daemon is still writing")
            }
        }
    }

    /// Whether a closing daemon has the file open.
    private static func holds(_ path: String) -> Bool {
        var wanted = stat()
        guard stat(path, &wanted) == 0 else { return false }
        let identity = FileIdentity(wanted)
        return TextFile.names(in: "/proc").contains { process in
            guard process.first?.isNumber == true, isClosing(process, path, identity) else {
                return false
            }
            let folder = "/proc/\(process)/fd"
            return TextFile.names(in: folder).contains { descriptor in
                var status = stat()
                return stat("\(folder)/\(descriptor)", &status) == 0
                    && FileIdentity(status) == identity
            }
        }
    }

    /// Whether the process is a qcowfs that shows the image no more: it says so itself, or there is
    /// no mount left that could be its own.
    private static func isClosing(
        _ process: String, _ path: String, _ identity: FileIdentity
    ) -> Bool {
        let name = TextFile.contents(of: "/proc/\(process)/comm")?.dropLast()
        if let name, name == processName { return true }
        guard name == "qcowfs", Int32(process) != getpid() else { return false }
        return !MountTable.entries(ofProcess: process).contains {
            $0.isOurs && shows($0.source, path, identity)
        }
    }

    /// Whether a mount of `source`, an image, some joined by colons, or a directory, may show the
    /// file, which has other names perhaps.
    private static func shows(_ source: String, _ path: String, _ identity: FileIdentity) -> Bool {
        let resolved = (try? Paths.resolved(path)) ?? path
        if source.contains(path) || resolved.hasPrefix(source + "/") { return true }
        return ([source] + source.split(separator: ":").map(String.init)).contains { image in
            var status = stat()
            return stat(image, &status) == 0 && FileIdentity(status) == identity
        }
    }
}
