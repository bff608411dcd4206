import Glibc
import TestSupport
import Testing

/// How long work says how far it has come.
@Suite("Progress", .needsQemuImg)
struct ProgressTests {
    @Test(
        "every long verb writes lines of JSON to a descriptor, and no bar where no terminal is",
        arguments: [
            "convert IMAGE OUT", "convert -c -O qcow2 IMAGE OUT", "convert IMAGE - > OUT",
            "convert -O qcow2 IMAGE - > OUT", "compare IMAGE IMAGE", "check IMAGE",
            "check --repair all IMAGE", "repair IMAGE", "commit OVERLAY",
            "rebase -b '' OVERLAY", "amend -o compat=0.10 IMAGE",
            "amend -o refcount_bits=64 IMAGE", "discard IMAGE", "compact IMAGE", "sha256 IMAGE",
            "sha1 IMAGE",
            "dehydrate IMAGE OUT",
        ])
    func lines(verb: String) throws {
        let folder = try TemporaryDirectory()
        let (image, overlay) = (folder.file("disk.qcow2"), folder.file("overlay.qcow2"))
        try makeImage(image)
        try QemuImg.create(overlay, backing: "disk.qcow2")
        try QemuImg.io(overlay, ["write -q -P 3 2M 64k"])
        let words = verb.replacing("IMAGE", with: image).replacing("OVERLAY", with: overlay)
            .replacing("OUT", with: folder.file("out"))
        let lines = folder.file("lines")
        let result = try Command.run([
            "bash", "-c", "\(TestEnvironment.program) \(words) --progress-fd 9 9> \(lines)",
        ])
        #expect(result.status == 0 && result.errors.isEmpty, "\(result)")
        let written = try TestFile(lines, O_RDONLY)
        let text = try String(decoding: written.read(0..<(written.byteCount())), as: UTF8.self)
        #expect(text.hasSuffix("{\"progress\": 100.0}\n"), "\(text)")
        for line in text.split(separator: "\n") {
            #expect(line.hasPrefix("{\"progress\": ") && line.hasSuffix("}"), "\(line)")
        }
        let quiet = try Command.run(["bash", "-c", "\(TestEnvironment.program) \(words) --quiet"])
        #expect(quiet.errors.isEmpty, "\(quiet)")
    }

    @Test(
        "Ctrl-C ends a check, and a repair that has not begun to write, with a sentence",
        arguments: ["check", "check --repair all", "repair"])
    func interrupted(verb: String) throws {
        let folder = try TemporaryDirectory()
        let (image, progress) = (folder.file("disk.qcow2"), folder.file("progress"))
        try Command.require(
            TestEnvironment.program, "create", "-o", "cluster_size=512,preallocation=metadata",
            image, "4G")
        try #require(mkfifo(progress, 0o600) == 0)
        let running = try Command.start([
            "bash", "-c",
            "exec \(TestEnvironment.program) \(verb) --progress-fd 9 \(image) 9> \(progress)",
        ])
        let lines = open(progress, O_RDONLY | O_CLOEXEC)
        defer { close(lines) }
        // The first line comes when the work has gone on for a while.
        var byte: UInt8 = 0
        #expect(read(lines, &byte, 1) == 1)
        kill(running.pid, SIGINT)
        expectRefusal(
            try running.wait(timeout: 20), naming: image, "interrupted; nothing was changed")
    }

    @Test("a descriptor that nothing can be written to is wrong usage, before anything is done")
    func closedDescriptor() throws {
        let folder = try TemporaryDirectory()
        let (image, out) = (folder.file("disk.qcow2"), folder.file("out"))
        try makeImage(image)
        for redirection in ["", "77< /dev/null"] {
            let result = try Command.run([
                "bash", "-c",
                "\(TestEnvironment.program) convert --progress-fd 77 \(image) \(out) "
                    + redirection,
            ])
            #expect(result.status == 64 && result.errors.contains("--progress-fd 77"), "\(result)")
            #expect(access(out, F_OK) != 0)
        }
    }
}
