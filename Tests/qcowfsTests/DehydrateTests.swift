import Foundation
import QCOW2
import TestSupport
import Testing

/// `dehydrate` and `rehydrate`: an image's metadata, to show to somebody else.
@Suite("Dehydration", .needsQemuImg)
struct DehydrateTests {
    let folder: TemporaryDirectory
    let out: String

    init() throws {
        folder = try TemporaryDirectory()
        out = folder.file("out")
    }

    /// Replaces an image by what comes back of it.
    private func replace(_ image: String, _ flags: String...) throws {
        try Command.require([TestEnvironment.program, "dehydrate"] + flags + [image, out])
        unlink(image)
        try Command.require(TestEnvironment.program, "rehydrate", out, image)
    }

    private struct Extent: Decodable, Equatable {
        let start: UInt64
        let length: UInt64
        let depth: Int
        let present: Bool
        let data: Bool
        let offset: UInt64?
    }

    /// What `map` says but for whether the file system has a hole: then neighbours may be one.
    private func map(_ made: Fixture.Made) throws -> [Extent] {
        let json = try Command.require(
            [TestEnvironment.program, "map", "--json"] + made.openOptions + [made.image])
        var joined: [Extent] = []
        for next in try JSONDecoder().decode([Extent].self, from: Data(json.utf8)) {
            if let last = joined.last, last.depth == next.depth, last.present == next.present,
                last.data == next.data, next.offset == last.offset.map({ $0 + last.length })
            {
                joined[joined.count - 1] = Extent(
                    start: last.start, length: last.length + next.length, depth: last.depth,
                    present: last.present, data: last.data, offset: last.offset)
            } else {
                joined.append(next)
            }
        }
        return joined
    }

    @Test(
        "check, info, map and explain say the same of what comes back", arguments: Fixtures.all)
    func same(_ fixture: Fixture) throws {
        let made = try fixture.made()
        func explanations() throws -> [String] {
            try [0, 65536, 1.MiB, 3.MiB].compactMap { offset in
                let result = try qcowfs("explain", made.image, "\(offset)")
                return result.status == 0 ? result.output : nil
            }
        }
        func description() throws -> String {
            try Command.require(TestEnvironment.program, "info", made.image)
                .split(separator: "\n").filter { !$0.hasPrefix("disk size") }
                .joined(separator: "\n")
        }
        let before = try (
            QemuImg.check(made.image), qcowfs("check", "--json", made.image), description(),
            map(made), explanations()
        )
        try replace(made.image)
        let check = try QemuImg.check(made.image)
        #expect(check.output == before.0.output && check.status == before.0.status, "\(check)")
        let ours = try qcowfs("check", "--json", made.image)
        #expect(ours.output == before.1.output, "\(ours)")
        #expect(try description() == before.2)
        #expect(try map(made) == before.3)
        #expect(try explanations() == before.4)
    }

    @Test("nothing of a guest comes along, and not much altogether")
    func size() throws {
        let image = folder.file("disk.qcow2")
        try makeImage(
            image, size: 64.MiB, commands: ["write -q -P 0x5E 0 40M", "write -q -z 1M 1M"])
        try Command.require(TestEnvironment.program, "dehydrate", image, out)
        #expect(try TestFile(out, O_RDONLY).byteCount() < 64.KiB)
        try replace(image)
        let status = try TestFile(image, O_RDONLY).status()
        #expect(Int(status.st_size) > 39.MiB && Int(status.st_blocks) * 512 < 1.MiB)
        try QemuImg.io(image, ["read -q -P 0 0 64M"])
        let bytes = try TestFile(image, O_RDONLY).read(0..<Int(status.st_size))
        #expect(!bytes.indices.dropLast().contains { bytes[$0] == 0x5E && bytes[$0 + 1] == 0x5E })
    }

    @Test("key material stays at home")
    func keys() throws {
        let fixture = try #require(Fixtures.all.first { $0.features.contains(.luks) })
        let made = try fixture.made()
        let bytes = try TestFile(made.image, O_RDONLY).read(0..<64.MiB)
        let start = try #require(
            (0..<4000).first { bytes.number(at: $0, as: UInt32.self) == 0x0537_be77 })
        let area = Int(bytes.number(at: start + 8, as: UInt64.self))
        try replace(made.image)
        let again = try TestFile(made.image, O_RDONLY).read(0..<64.MiB)
        #expect(again.count == bytes.count)
        #expect(again[area..<area + 112] == bytes[area..<area + 112])
        // Digest, salts, and everything in the slots.
        #expect(again[area + 112..<area + 164].allSatisfy { $0 == 0 })
        #expect(again[area + 592..<area + 0x1f_9000].allSatisfy { $0 == 0 })
        expectRefusal(
            try Command.run(
                [TestEnvironment.program, "read", "--length", "512"] + made.openOptions
                    + [made.image]), naming: "passphrase")
    }

    @Test("names are redacted if that is wished")
    func names() throws {
        try QemuImg.create(folder.file("secret-name.qcow2"), size: 1.MiB)
        let image = folder.file("disk.qcow2")
        try QemuImg.create(image, backing: "secret-name.qcow2")
        try QemuImg.snapshot(image, create: "secret-project")
        try replace(image)
        #expect(try qcowfs("info", image).output.contains("secret-name.qcow2"))
        try replace(image, "--redact-names")
        let info = try qcowfs("info", image)
        #expect(info.status == 0 && !info.output.contains("secret"), "\(info)")
        #expect(try Command.run(["grep", "-c", "secret", out]).output.hasPrefix("0"))
    }

    @Test(
        "no number of an image makes it fail or take a gigabyte", arguments: TrapProgramTests.bombs)
    func bombs(_ bomb: TrapProgramTests.Bomb) throws {
        let path = try TrapProgramTests.image(with: bomb, in: folder)
        let result = try Command.run(
            [
                "bash", "-c", "ulimit -v 1048576; exec \"$0\" dehydrate \"$1\" \"$2\"",
                TestEnvironment.program, path, out,
            ], timeout: 60)
        #expect(result.status == 0, "\(result)")
        try Command.require(TestEnvironment.program, "rehydrate", out, path)
        #expect(try Int(TestFile(path, O_RDONLY).status().st_size) == 1 << 36)
    }

    @Test("what is no image and what is no dehydrated one is refused, and leaves nothing")
    func refusals() throws {
        let notes = try folder.write(Array("hello".utf8), to: "notes")
        expectRefusal(try qcowfs("dehydrate", notes, out), naming: "not a qcow2 image")
        expectRefusal(try qcowfs("rehydrate", notes, out), naming: "no dehydrated image")
        #expect(access(out, F_OK) != 0)
        let image = folder.file("disk.qcow2")
        try makeImage(image)
        expectRefusal(try qcowfs("dehydrate", image, image), naming: "its own metadata")
    }
}
