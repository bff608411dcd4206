import Foundation
import TestSupport
import Testing

/// Whatever QEMU makes is shown with the same bytes and the same holes.
@Suite("Images of QEMU's", .enabledWhereMountable)
struct FixtureTests {
    @Test(
        "reading through the mount equals qemu-img convert, and holes equal qemu-img map",
        arguments: Fixtures.all)
    func equalsConvert(_ fixture: Fixture) throws {
        let made = try fixture.made()
        let raw = made.folder.file("expected.raw")
        try QemuImg.convert(made, to: raw)
        let extents = try Self.extents(QemuImg.mapText(made))
        let mount = try TestMount(made.image, in: made.folder, options: made.mountOptions)
        let (isEqual, ranges) = try Self.look(at: mount, beside: raw)
        try mount.unmount()
        #expect(isEqual)
        #expect(ranges == Self.joined(extents.filter { $0.data }.map(\.range)))
    }

    @Test("map prints what qemu-img map prints", arguments: Fixtures.all)
    func map(_ fixture: Fixture) throws {
        let made = try fixture.made()
        let words = made.openOptions + [made.image]
        let ours = try Command.require([TestEnvironment.program, "map", "--json"] + words)
        let theirs = try QemuImg.mapText(made)
        // Of nothing it prints one run without bytes.
        #expect(ours == (theirs.contains("\"length\": 0,") ? "[]\n" : theirs))
        let human = try Command.run(
            ["qemu-img", "map", "--output=human"] + made.source)
        let lines = try Command.require([TestEnvironment.program, "map"] + words)
        if human.status == 0 {
            #expect(lines == human.output)
        } else {
            // There it gives up, at the first cluster whose bytes do not lie in the file as such.
            #expect(lines.contains("compressed") || lines.contains("encrypted"))
        }
    }

    @Test("Every feature is in a recipe, and none of the recipes is left out")
    func everything() {
        for feature in Fixture.Feature.allCases {
            #expect(Fixtures.all.contains { $0.features.contains(feature) })
        }
        #expect(Set(Fixtures.all.map(\.description)).count == Fixtures.all.count)
    }

    struct Extent: Decodable {
        let start: Int
        let length: Int
        let data: Bool
        var range: Range<Int> { start..<start + length }
    }

    static func extents(_ json: String) throws -> [Extent] {
        try JSONDecoder().decode([Extent].self, from: Data(json.utf8)).filter { $0.length > 0 }
    }

    static func joined(_ ranges: [Range<Int>]) -> [Range<Int>] {
        var joined: [Range<Int>] = []
        for range in ranges {
            if let last = joined.last, last.upperBound == range.lowerBound {
                joined[joined.count - 1] = last.lowerBound..<range.upperBound
            } else {
                joined.append(range)
            }
        }
        return joined
    }

    /// Whether the mounted disk has the bytes of the raw file `raw`, and its data ranges.
    private static func look(
        at mount: TestMount, beside raw: String
    ) throws -> (isEqual: Bool, ranges: [Range<Int>]) {
        let file = try mount.open(O_RDONLY)
        let expected = try TestFile(raw, O_RDONLY)
        let byteCount = try expected.byteCount()
        guard try file.byteCount() == byteCount else { return (false, []) }
        let ranges = try file.dataRanges()
        // All of a small disk, of a large one what is data for one of the two.
        let looked =
            byteCount <= 64.MiB ? [0..<byteCount] : try ranges + expected.dataRanges()
        for range in looked {
            for start in stride(from: range.lowerBound, to: range.upperBound, by: 1.MiB) {
                let part = start..<min(start + 1.MiB, range.upperBound)
                guard try file.read(part) == expected.read(part) else { return (false, ranges) }
            }
        }
        return (true, ranges)
    }
}
