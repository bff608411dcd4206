import Glibc
import TestSupport
import Testing

/// `commit`: an overlay's content moves into the file below it.
@Suite("Committing to a backing file", .needsQemuImg)
struct CommitVerbTests {
    let folder: TemporaryDirectory
    let base: String
    let top: String
    let before: String

    init() throws {
        folder = try TemporaryDirectory()
        base = folder.file("base")
        top = folder.file("top.qcow2")
        before = folder.file("before.raw")
    }

    private func makeTop(format: String, size: Int) throws {
        try QemuImg.create(top, size: size, backing: "base", backingFormat: format)
        try QemuImg.io(
            top,
            [
                "write -q -P 5 64k 128k", "write -q -z 1M 64k", "write -q -P 6 3M 1000",
                "write -q -P 7 \(size - 512) 512",
            ])
        try QemuImg.convert(top, to: before, from: "qcow2", format: "raw")
    }

    @Test(
        "the backing file, qcow2 or raw, shorter or not, reads as the overlay did",
        arguments: ["qcow2", "raw"], [8.MiB, 12.MiB])
    func commit(format: String, size: Int) throws {
        try makeImage(base, commands: ["write -q -P 1 0 4M"])
        if format == "raw" {
            let raw = folder.file("base.raw")
            try QemuImg.convert(base, to: raw, from: "qcow2", format: "raw")
            rename(raw, base)
        }
        try makeTop(format: format, size: size)
        #expect(try qcowfs("commit", top).status == 0)
        #expect(
            try Command.run([
                "qemu-img", "compare", "-f", format, "-F", "raw", base, before,
            ]).status == 0)
        #expect(try QemuImg.difference(before, top) == nil)
        #expect(try QemuImg.check(top).status == 0)
        let own = try QemuImg.map(top).filter { $0.depth == 0 }
        #expect(own.isEmpty)
        if format == "qcow2" { #expect(try QemuImg.check(base).status == 0) }
    }

    @Test(
        "a backing file with an external data file takes it in too",
        arguments: [[], ["data_file_raw=on"]])
    func dataFileBelow(options: [String]) throws {
        let data = folder.file("base.data")
        try makeImage(
            base, options: ["data_file=\(data)"] + options, commands: ["write -q -P 1 0 4M"])
        try makeTop(format: "qcow2", size: 12.MiB)
        #expect(try qcowfs("commit", top).status == 0)
        #expect(try QemuImg.difference(before, base) == nil)
        #expect(try QemuImg.difference(before, top) == nil)
        #expect(try QemuImg.check(base).status == 0)
        if !options.isEmpty { #expect(try Command.run(["cmp", data, before]).status == 0) }
    }

    @Test("an image without a backing file, or with one in use, is refused and unchanged")
    func refusals() throws {
        try makeImage(base)
        expectRefusal(try qcowfs("commit", base), naming: "no backing file")
        try makeTop(format: "qcow2", size: 8.MiB)
        let sums = try Command.shell("sha256sum \(base) \(top)")
        try whileQEMUHas(base, flags: ["-r"]) { _ in
            expectRefusal(try qcowfs("commit", top), naming: "base", "in use")
        }
        #expect(try Command.shell("sha256sum \(base) \(top)") == sums)
    }
}
