import Glibc
import QCOW2

/// `raw-disk IMAGE RAW [SNAPSHOT]` makes a raw disk of an image, as Apple's Virtualization
/// framework and other virtual machines need it: sparse, complete, or not there at all.
@main
struct RawDisk {
    static func main() {
        let words = Array(CommandLine.arguments.dropFirst())
        guard (2...3).contains(words.count) else { exit(64) }
        do throws(ImageError) {
            let disk = try SourceDisk(
                path: words[0], format: .qcow2, snapshot: words.count > 2 ? words[2] : nil)
            var conversion = Conversion(to: .raw)
            conversion.threadCount = max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN)))
            try conversion.run(from: disk, toFileAt: words[1]) { part in
                print("\r\(Int(part * 100)) %", terminator: "")
                fflush(nil)
                return true  // false would stop it, and leave nothing behind
            }
            print("\r\(words[1]): \(disk.size) bytes")
            try disk.close()
        } catch {
            print("raw-disk: \(error)")
            exit(1)
        }
    }
}
