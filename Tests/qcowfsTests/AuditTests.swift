import Foundation
import TestSupport
import Testing

/// `audit`: what an image from strangers refers to and asks for.
@Suite("Audit", .serialized, .needsQemuImg)
struct AuditTests {
    struct Report: Decodable {
        struct Reference: Decodable {
            let kind: String
            let name: String
            let form: String
            let verdict: String
            let format: String?
            let path: String?

            enum CodingKeys: String, CodingKey {
                case kind, name, form, verdict, format
                case path = "resolved-path"
            }
        }
        struct Named: Decodable { let name: String? }
        struct Contents: Decodable {
            let clusters: UInt64
            let compressed: UInt64
            let expanded: UInt64

            enum CodingKeys: String, CodingKey {
                case clusters = "data-clusters"
                case compressed = "compressed-clusters"
                case expanded = "expanded-size"
            }
        }

        let verdict: String
        let refusals: [String]
        let warnings: [String]
        let references: [Reference]
        let features: [Named]
        let snapshots: [Named]
        let bitmaps: [Named]
        let tables: [String: UInt64]
        let contents: Contents
    }

    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        _ = try folder.directory("images")
        image = folder.file("images/top.qcow2")
    }

    /// An audit that ends with `status`, and its report.
    private func audit(
        _ words: String..., status: Int32, sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> Report {
        let result = try Command.run([TestEnvironment.program, "audit"] + words + [image])
        #expect(result.status == status, "\(result)", sourceLocation: sourceLocation)
        // One line says why, where the report says that the image is refused.
        #expect(
            result.errors.split(separator: "\n").count == (status == 0 ? 0 : 1), "\(result)",
            sourceLocation: sourceLocation)
        let report = try JSONDecoder().decode(Report.self, from: Data(result.output.utf8))
        #expect(report.verdict == (status == 0 ? "allowed" : "refused"))
        #expect(report.refusals.isEmpty == (status == 0))
        return report
    }

    private func write(_ builder: ImageBuilder) throws {
        _ = try folder.write(builder.build(), to: "images/top.qcow2")
    }

    private func overlay(_ name: String, format: String? = "qcow2") throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.backingName = name.replacing("FOLDER", with: folder.path)
        if let format { builder.extensions = [(0xe279_2aca, Array(format.utf8))] }
        try write(builder)
    }

    @Test("an image that stands alone is allowed, and its tables are weighed")
    func alone() throws {
        try makeImage(image, commands: ["write -q 0 1M"])
        try QemuImg.snapshot(image, create: "before")
        try Command.require("qemu-img", "bitmap", "--add", image, "bits")
        let report = try audit(status: 0)
        #expect(report.references.isEmpty && report.warnings.isEmpty)
        #expect(report.snapshots.map(\.name) == ["before"])
        #expect(report.bitmaps.map(\.name) == ["bits"])
        #expect(report.features.map(\.name) == ["bitmaps"])
        #expect(report.tables["l1"] == 8 && report.tables["refcount-table"] == 65536)
        #expect(report.contents.clusters == 16 && report.contents.expanded == 1 << 20)
        let text = try qcowfs("audit", "--output", "human", image)
        #expect(text.status == 0 && text.output.contains("verdict: allowed"), "\(text)")
    }

    @Test(
        "a backing file that the policy forbids is refused with exit 1, and the report is printed",
        arguments: [
            ("/etc/passwd", "path"), ("../base.qcow2", "path"), ("link.qcow2", "path"),
            ("/nowhere/at-all", "path"), ("pipe", "path"), ("top.qcow2", "path"),
            ("json:{\"driver\":\"raw\"}", "json"), ("nbd://127.0.0.1/x", "protocol"),
            ("file:inside.qcow2", "protocol"),
        ])
    func forbidden(name: String, form: String) throws {
        try makeImage(folder.file("base.qcow2"))
        symlink(folder.file("base.qcow2"), folder.file("images/link.qcow2"))
        mkfifo(folder.file("images/pipe"), 0o600)
        try overlay(name)
        let report = try audit(status: 1)
        #expect(report.references.map(\.name) == [name])
        #expect(report.references.map(\.form) == [form])
        #expect(report.references.map(\.verdict) == ["refused"])
        #expect(report.references.map(\.kind) == ["backing-file"])
    }

    @Test("--allow-path widens the policy, --trust-paths lifts it")
    func widened() throws {
        try makeImage(folder.file("base.qcow2"))
        try overlay("../base.qcow2")
        _ = try audit(status: 1)
        for words in [["--allow-path", folder.path], ["--trust-paths", "--json"]] {
            let report = try audit(words[0], words[1], status: 0)
            #expect(report.references.map(\.path) == [folder.file("base.qcow2")])
        }
    }

    @Test("a name that is allowed and leads nowhere is missing, which is no refusal")
    func missing() throws {
        try overlay("gone.qcow2")
        let report = try audit(status: 0)
        #expect(report.references.map(\.verdict) == ["missing"])
        #expect(report.warnings.contains { $0.contains("gone.qcow2") })
    }

    @Test("a format that nobody reads is refused, one that is not said is warned of")
    func formats() throws {
        try makeImage(folder.file("images/base.qcow2"))
        try overlay("base.qcow2", format: "nbd")
        #expect(try audit(status: 1).references.map(\.format) == ["nbd"])
        try overlay("base.qcow2", format: nil)
        #expect(try audit(status: 0).warnings.contains { $0.contains("guessed") })
    }

    @Test("a data file is judged like a backing file")
    func dataFile() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.incompatibleFeatures = 4
        try write(builder)
        #expect(try audit(status: 1).refusals[0].contains("does not name"))
        builder.extensions = [(0x4441_5441, Array("/etc/shadow".utf8))]
        try write(builder)
        let report = try audit(status: 1)
        #expect(report.references.map(\.kind) == ["data-file"])
        #expect(report.references.map(\.verdict) == ["refused"])
    }

    @Test("an unknown feature is refused by the name that the image gives it")
    func unknownFeature() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.incompatibleFeatures = 1 << 17
        let name = Array("time travel".utf8)
        builder.extensions = [
            (0x6803_f857, [0, 17] + name + [UInt8](repeating: 0, count: 46 - name.count))
        ]
        try write(builder)
        let report = try audit(status: 1)
        #expect(report.features.map(\.name) == ["time travel"])
        #expect(report.refusals[0].contains("time travel"))
    }

    @Test("a LUKS key that takes too long to derive is refused")
    func slowKey() throws {
        let fixture = Fixtures.all.first { $0.features.contains(.luks) }
        let made = try #require(fixture).made()
        let allowed = try qcowfs("audit", made.image)
        #expect(allowed.status == 0 && allowed.output.contains("\"iters\""), "\(allowed)")
        // The rounds of the first key slot.
        let file = try TestFile(made.image, O_RDWR)
        let header = try file.read(0..<4096)
        let start = try #require(
            (0..<4000).first { header.number(at: $0, as: UInt32.self) == 0x0537_be77 })
        let area = Int(header.number(at: start + 8, as: UInt64.self))
        try file.write([0x7f, 0xff, 0xff, 0xff], at: area + 208 + 4)
        let refused = try qcowfs("audit", made.image)
        #expect(refused.status == 1, "\(refused)")
        #expect(refused.errors.contains("2147483647 rounds of PBKDF2"), "\(refused)")
    }

    @Test("a small file that unfolds to gigabytes is warned of")
    func bomb() throws {
        var builder = ImageBuilder(byteCount: 4096.MiB)
        let host = builder.fill(0x11, guestCluster: 0)
        for cluster in 1..<8192 { builder.setEntry(UInt64(host), guestCluster: cluster) }
        let table = builder.entryOffset(0)
        for index in 1..<8 { builder.put(UInt64(table), at: builder.l1Offset + index * 8) }
        try write(builder)
        let report = try audit(status: 0)
        #expect(report.contents.expanded == 4 << 30)
        #expect(report.warnings.contains { $0.contains("\(4 << 30) bytes") }, "\(report)")
    }

    @Test(
        "no number of an image makes it fail or take a gigabyte", arguments: TrapProgramTests.bombs)
    func numbers(_ bomb: TrapProgramTests.Bomb) throws {
        let path = try TrapProgramTests.image(with: bomb, in: folder)
        let result = try Command.run(
            ["bash", "-c", "ulimit -v 1048576; exec \"$0\" audit \"$1\"", TestEnvironment.program]
                + [path], timeout: 60)
        #expect(result.status <= 1, "\(result)")
        #expect(result.errors.split(separator: "\n").count == Int(result.status), "\(result)")
    }

    @Test("only the image is opened", .enabled(if: TestEnvironment.has("strace"), "no strace"))
    func opensNothingElse() throws {
        try makeImage(folder.file("images/base.qcow2"))
        // Without a format the first bytes of the backing file would be of interest.
        try overlay("base.qcow2", format: nil)
        let trace = folder.file("trace")
        try Command.require(
            "strace", "-f", "-e", "trace=open,openat,openat2", "-o", trace,
            TestEnvironment.program, "audit", image)
        let lines = try String(contentsOfFile: trace, encoding: .utf8)
        #expect(lines.contains("top.qcow2") && !lines.contains("base.qcow2"), "\(lines)")
    }

    @Test("what is no image is refused in one line")
    func noImage() throws {
        _ = try folder.write(Array("hello".utf8), to: "images/top.qcow2")
        expectRefusal(try qcowfs("audit", image), naming: "not a qcow2 image")
        expectRefusal(try qcowfs("audit", folder.file("none")), naming: "none")
    }
}
