import Glibc
import ImageMount
import Logging

/// `mount-image IMAGE DIRECTORY` shows an image as a raw file in a directory, until it is
/// unmounted or interrupted.
@main
struct MountImage {
    static func main() {
        let words = Array(CommandLine.arguments.dropFirst())
        guard words.count == 2 else { exit(64) }
        var options = MountOptions(logger: Logger(label: "mount-image"))
        // Otherwise a daemon of its own serves the files, and this process ends.
        options.staysInForeground = true
        let request = MountRequest(images: [words[0]], mountpoint: words[1], options: options)
        do throws(MountError) {
            // Every write is in the image when this returns.
            let status = try Mounting.mount(request) { files in
                print("\(files[0]) is ready; Ctrl-C, or umount \(words[1]), ends it")
                fflush(nil)
            }
            exit(status)
        } catch {
            print("mount-image: \(error)")
            exit(1)
        }
    }
}
