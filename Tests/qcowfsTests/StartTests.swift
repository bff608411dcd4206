import Foundation
import TestSupport
import Testing

/// The program in surroundings that are not as usual.
@Suite("Starting", .serialized, .needsQemuImg)
struct StartTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
        try makeImage(image)
    }

    /// Runs the program from a shell that does `before`, with `redirection` behind it.
    private func run(
        before: String = ":", _ redirection: String = "", _ words: String...
    ) throws -> Command.Result {
        try Command.run(
            ["sh", "-c", "\(before); exec \"$@\" \(redirection)", "sh", TestEnvironment.program]
                + words, timeout: 30)
    }

    private func bytes(_ path: String) throws -> Data {
        try Data(contentsOf: URL(fileURLWithPath: path))
    }

    @Test("a closed input has nothing to be written to an image")
    func closedInput() throws {
        let before = try bytes(image)
        let result = try run("<&-", "write", "--offset", "0", image)
        expectRefusal(result, naming: "Bad file descriptor")
        #expect(try bytes(image) == before)
    }

    @Test("no message gets into an image", arguments: [">&-", "2>&-", "<&- >&- 2>&-"])
    func closedOutput(streams: String) throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        let data = builder.fill(7, guestCluster: 3)
        builder.count(data..<data + 65536, by: 3)
        _ = try folder.write(builder.build(), to: "disk.qcow2")
        _ = try run(streams, "repair", image)
        #expect(try QemuImg.check(image).status == 0)
        #expect(try QemuImg.io(image, ["read -q -P 7 192k 64k"]).isEmpty)
    }

    @Test(
        "a mount works whichever streams are closed", .enabledWhereMountable,
        arguments: ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    func mount(streams: String) throws {
        let mountpoint = try folder.directory("mnt")
        #expect(try run(streams, "mount", image, mountpoint).status == 0)
        let mounted = TestMount(existing: image, on: mountpoint)
        try use(mounted)
        try mounted.unmount()
        try QemuImg.io(image, ["read -q -P 5 1M 4k", "read -q -P 0xA1 0 128k"])
        #expect(try QemuImg.check(image).status == 0)
    }

    private func use(_ mount: TestMount) throws {
        let file = try mount.open()
        #expect(try holds(file, 0..<128.KiB, 0xA1))
        try file.write([UInt8](repeating: 5, count: 4096), at: 1.MiB)
        try file.sync()
    }

    @Test(
        "a root without /proc is enough for verbs",
        .enabled(if: geteuid() == 0, "only root can take /proc away"))
    func withoutProc() throws {
        let raw = folder.file("disk.raw")
        let result = try Command.run([
            "unshare", "-m", "sh", "-c", "umount -l /proc && exec \"$@\"", "sh",
            TestEnvironment.program, "convert", image, raw,
        ])
        #expect(result.status == 0 && result.output.isEmpty, "\(result)")
        #expect(try QemuImg.difference(raw, image) == nil)
    }

    @Test("a file that may not grow is an error, and the image stays whole")
    func fileSizeLimit() throws {
        let input = try folder.write([UInt8](repeating: 3, count: 4.MiB), to: "input")
        let result = try run(before: "ulimit -f 1000", "<\(input)", "write", "--offset", "0", image)
        expectRefusal(result, naming: "File too large")
        #expect(try [0, 3].contains(QemuImg.check(image).status))
        let copy = folder.file("copy.qcow2")
        let conversion = try run(before: "ulimit -f 8", "", "convert", "-O", "qcow2", image, copy)
        expectRefusal(conversion, naming: "File too large")
        #expect(!FileManager.default.fileExists(atPath: copy))
    }

    @Test(
        "nor does the limit end a mount", .enabledWhereMountable)
    func fileSizeLimitOfMount() throws {
        let mountpoint = try folder.directory("mnt")
        #expect(try run(before: "ulimit -f 1000", "", "mount", image, mountpoint).status == 0)
        let mounted = TestMount(existing: image, on: mountpoint)
        #expect(throws: CallError.self) { try fill(mounted) }
        #expect(try holds(mounted.open(), 0..<128.KiB, 0xA1))
        try mounted.unmount()
        #expect(try [0, 3].contains(QemuImg.check(image).status))
    }

    private func fill(_ mount: TestMount) throws {
        let file = try mount.open()
        try file.write([UInt8](repeating: 3, count: 4.MiB), at: 2.MiB)
        try file.sync()
    }
}
