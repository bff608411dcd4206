import Glibc
import TestSupport
import Testing

/// `resize`: where it cannot be done, and on images that are mounted.
@Suite("Changing the size of a disk", .needsQemuImg)
struct ResizeVerbTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    @Test("what lies below a mounted image is refused as its backing file", .enabledWhereMountable)
    func backingFile() throws {
        let top = folder.file("top.qcow2")
        try makeImage(image)
        try QemuImg.create(top, backing: "disk.qcow2")
        for options in [[], ["--read-only"]] {
            let mount = try TestMount(top, in: folder, options: options)
            for words in [["resize", image, "+1M"], ["snapshot", "-c", "new", image]] {
                expectRefusal(
                    try Command.run([TestEnvironment.program] + words), naming: "disk.qcow2: ",
                    "the backing file of", "top.qcow2", "process \(try mount.daemon())")
            }
            try mount.unmount()
        }
    }
}
