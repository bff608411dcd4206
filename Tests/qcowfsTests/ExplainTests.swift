import Foundation
import QCOW2
import TestSupport
import Testing

/// `explain`: how one byte is found.
@Suite("Explain", .needsQemuImg)
struct ExplainTests {
    struct Report: Decodable {
        struct Entry: Decodable {
            let index: UInt64
            let entry: String
            let copied: Bool
            let refcount: UInt64?
        }
        struct Cluster: Decodable {
            let offset: UInt64
            let refcount: UInt64?
        }
        struct Place: Decodable {
            let filename: String
            let offset: UInt64
        }
        struct Snapshot: Decodable {
            let name: String
            let cluster: Bool
        }
        struct Layer: Decodable {
            let filename: String
            let l1: Entry?
            let l2: Entry?
            let answer: String
            let reason: String?
            let place: Place?
            let clusters: [Cluster]
            let snapshots: [Snapshot]
        }

        let layers: [Layer]
        let obstacle: String?
    }

    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    private func explain(_ words: String..., status: Int32 = 0) throws -> Report {
        let result = try Command.run([TestEnvironment.program, "explain", "--json"] + words)
        #expect(result.status == status, "\(result)")
        return try JSONDecoder().decode(Report.self, from: Data(result.output.utf8))
    }

    struct Extent: Decodable {
        let start: UInt64
        let length: UInt64
        let depth: Int
        let present: Bool
        let zero: Bool
        let data: Bool
        let offset: UInt64?
    }

    @Test("it finds every byte where qemu-img map has it", arguments: Fixtures.all)
    func equalsMap(_ fixture: Fixture) throws {
        let made = try fixture.made()
        let extents = try JSONDecoder().decode(
            [Extent].self, from: Data(QemuImg.mapText(made).utf8))
        // Some of the many runs that small clusters make.
        let step = max(1, extents.count / 200)
        for extent in stride(from: 0, to: extents.count, by: step).map({ extents[$0] })
        where extent.length > 0 {
            for into in Set([0, extent.length / 2, extent.length - 1]) {
                let offset = extent.start + into
                let explanation = try Explanation(path: made.image, offset: offset)
                let last = try #require(explanation.layers.last)
                if extent.present {
                    #expect(explanation.layers.count == extent.depth + 1, "\(offset) \(extent)")
                }
                switch last.answer {
                case .data:
                    #expect(extent.data, "\(offset) \(extent)")
                    if let start = extent.offset {
                        #expect(last.place?.offset == start + into, "\(offset) \(extent)")
                    }
                case .compressed: #expect(extent.data && extent.offset == nil, "\(offset)")
                case .corrupt(let words): Issue.record("\(offset): \(words)")
                default: #expect(extent.zero && !extent.data, "\(offset) \(extent) \(last.answer)")
                }
            }
        }
    }

    @Test("tables, entries, counts and snapshots are told by number")
    func numbers() throws {
        try makeImage(image, commands: ["write -q -P 1 1M 192k"])
        try QemuImg.snapshot(image, create: "before")
        try QemuImg.io(image, ["write -q -P 2 1M 64k"])
        let old = try explain(image, "0x11fe00")
        #expect(old.layers.count == 1)
        let layer = old.layers[0]
        #expect(layer.answer == "data" && layer.l1?.index == 0 && layer.l2?.index == 17)
        #expect(layer.l1?.copied == true && layer.l1?.refcount == 1)
        #expect(layer.l2?.copied == false && layer.l2?.entry.count == 18)
        #expect(layer.clusters.map(\.refcount) == [2])
        #expect(layer.snapshots.map(\.name) == ["before"] && layer.snapshots[0].cluster)
        #expect(layer.place?.offset == (layer.clusters.first?.offset ?? 0) + 0xfe00)
        let bytes = try TestFile(image, O_RDONLY).read(0..<1.MiB)
        #expect(layer.place.map { bytes[Int($0.offset)] } == 1)

        let new = try explain(image, "1M").layers[0]
        #expect(new.l2?.copied == true && new.clusters.map(\.refcount) == [1])
        #expect(new.snapshots.isEmpty)
        let then = try explain("-l", "before", image, "1M").layers[0]
        #expect(then.place.map { bytes[Int($0.offset)] } == 1)
    }

    @Test("a person reads it in a few lines")
    func human() throws {
        try QemuImg.create(folder.file("base.qcow2"), size: 1.MiB)
        try QemuImg.create(image, size: 4.MiB, backing: "base.qcow2")
        let short = try qcowfs("explain", image, "2M")
        #expect(short.status == 0)
        #expect(short.output.contains("zero: the disk ends before the byte"), "\(short)")
        let hole = try qcowfs("explain", image, "64k")
        #expect(hole.output.contains("the backing file is asked"), "\(hole)")
        #expect(hole.output.contains("nothing is stored"), "\(hole)")
        try QemuImg.io(image, ["write -q 64k 64k"])
        let data = try qcowfs("explain", image, "0x10200")
        #expect(data.output.contains("L1 entry 0 at 0x30000: 0x8000000000040000"), "\(data)")
        #expect(data.output.contains("COPIED, refcount 1"), "\(data)")
        #expect(data.output.contains("offset 328192 (0x50200)"), "\(data)")
    }

    @Test("a backing file that cannot be asked is an obstacle, after what is known")
    func obstacle() throws {
        try QemuImg.create(folder.file("base.qcow2"), size: 1.MiB)
        try QemuImg.create(image, size: 1.MiB, backing: "base.qcow2")
        unlink(folder.file("base.qcow2"))
        let report = try explain(image, "0", status: 1)
        #expect(report.layers.map(\.answer) == ["unallocated"])
        #expect(report.obstacle?.contains("base.qcow2") == true)
        let result = try qcowfs("explain", image, "0")
        #expect(result.errors.split(separator: "\n").count == 1, "\(result)")
        // What the image has itself needs no other file.
        try Command.require(
            "qemu-img", "create", "-q", "-f", "qcow2", folder.file("base.qcow2"), "1M")
        try QemuImg.io(image, ["write -q -P 3 0 64k"])
        unlink(folder.file("base.qcow2"))
        #expect(try explain(image, "0").layers.map(\.answer) == ["data"])
    }

    @Test("entries that make no sense are shown as they are")
    func damage() throws {
        var builder = ImageBuilder(byteCount: 4.MiB)
        for cluster in 0..<4 { builder.fill(1, guestCluster: cluster) }
        builder.setEntry(0x8000_0000_0005_0200, guestCluster: 0)
        builder.setEntry(0xC000_0000_0005_0000, guestCluster: 1)
        builder.setEntry(0x7fff_ffff_ffff_ffff, guestCluster: 2)
        builder.setEntry(0x3f00_0000_0000_0001 | 1 << 40, guestCluster: 3)
        _ = try folder.write(builder.build(), to: "disk.qcow2")
        let inside = try explain(image, "0").layers[0]
        #expect(inside.answer == "corrupt" && inside.reason?.contains("inside a cluster") == true)
        #expect(inside.l2?.entry == "0x8000000000050200")
        #expect(try explain(image, "64k").layers[0].answer == "corrupt")
        #expect(try explain(image, "128k").layers[0].answer == "compressed")
        #expect(try explain(image, "192k").layers[0].answer == "zero-allocated")
        var bytes = builder.build()
        bytes.put(UInt64(0x8000_0000_0002_0200), at: builder.l1Offset)
        _ = try folder.write(bytes, to: "disk.qcow2")
        let l1 = try explain(image, "0").layers[0]
        #expect(l1.answer == "corrupt" && l1.l2 == nil)
    }

    @Test(
        "no number of an image makes it fail or take a gigabyte", arguments: TrapProgramTests.bombs)
    func bombs(_ bomb: TrapProgramTests.Bomb) throws {
        let path = try TrapProgramTests.image(with: bomb, in: folder)
        let result = try Command.run(
            [
                "bash", "-c", "ulimit -v 1048576; exec \"$0\" explain \"$1\" 0",
                TestEnvironment.program, path,
            ], timeout: 60)
        if result.status != 0 { expectRefusal(result) }
    }

    @Test("what is outside of the disk, or no number, is refused")
    func refusals() throws {
        try makeImage(image)
        expectRefusal(try qcowfs("explain", image, "8M"), naming: "outside of the disk")
        expectRefusal(try qcowfs("explain", "-l", "none", image, "0"), naming: "none")
        #expect(try qcowfs("explain", image, "here").status == 64)
    }
}
