import QCOW2
import TestSupport
import Testing

/// Bitmaps that are made, changed and removed, judged by the tests' own reader.
@Suite("Changing bitmaps")
struct BitmapChangeTests {
    /// What a header may hold besides the bitmaps.
    struct Surroundings: Sendable, CustomTestStringConvertible {
        /// Bytes of another extension's data, before the bitmaps' own; nil for none.
        var fill: Int?
        /// Of how many characters the backing file's name is; 0 for none.
        var nameLength = 0

        var testDescription: String { "\(fill ?? -1) bytes before, a name of \(nameLength)" }

        func builder() -> ImageBuilder {
            var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 12)
            if let fill { builder.extensions = [(0x1234_5678, [UInt8](repeating: 7, count: fill))] }
            if nameLength > 0 { builder.backingName = name }
            builder.fill(0x11, guestCluster: 0)
            return builder
        }

        var name: String { String(repeating: "b", count: nameLength) }
        var backing: [Image.Backing] {
            nameLength > 0 ? [.raw(RAMDisk(byteCount: UInt64(1.MiB)))] : []
        }
    }

    /// The extension ends before, at and behind each multiple of eight around the first sector's
    /// end, where one write is no longer enough; names stand in its way, or are moved.
    static let all: [Surroundings] =
        [Surroundings(), Surroundings(nameLength: 1), Surroundings(nameLength: 500)]
        + stride(from: 336, through: 400, by: 8).map { Surroundings(fill: $0) }
        + [300, 352, 361].flatMap { fill in
            [3, 40, 700].map { Surroundings(fill: fill, nameLength: $0) }
        }

    private typealias Found = (names: [String], flags: [UInt32], marked: [[Int]])

    /// Makes changes in one session each, and looks at the image after each.
    private func change(
        _ device: RecordingDevice, _ around: Surroundings, _ name: String,
        _ changes: [BitmapChange], writing offset: Int? = nil
    ) throws -> Found {
        var found: Found = ([], [], [])
        try changeImage(on: device, backing: around.backing) { image in
            try image.changeBitmap(Array(name.utf8), changes)
        }
        if let offset {
            try changeImage(on: device, backing: around.backing) { try $0.write([1], at: offset) }
        }
        try changeImage(on: device, backing: around.backing) { _ in
        } judge: { reader in
            let bitmaps = try reader.bitmaps()
            found = (bitmaps.map(\.name), bitmaps.map(\.flags), bitmaps.map(\.marked))
            let others = try reader.extensions().filter { $0.type == 0x1234_5678 }
            #expect(others.map(\.data.count) == (around.fill.map { [$0] } ?? []))
            #expect(others.allSatisfy { $0.data.allSatisfy { $0 == 7 } })
            #expect(reader.backingName == (around.nameLength > 0 ? around.name : nil))
        }
        return found
    }

    @Test("A bitmap's whole life keeps what else the header has", arguments: all)
    func wholeLife(_ around: Surroundings) throws {
        let device = RecordingDevice(around.builder().build(), yielding: false)
        var found = try change(
            device, around, "first", [.add(granularity: 65536)], writing: 70_000)
        #expect(found.names == ["first"] && found.flags == [2] && found.marked == [[1]])

        found = try change(
            device, around, "second", [.add(granularity: 512), .disable], writing: 1024)
        #expect(found.names == ["first", "second"] && found.flags == [2, 0])
        #expect(found.marked == [[0, 1], []])

        found = try change(
            device, around, "second", [.enable, .merge(source: "first", path: nil)],
            writing: 600_000)
        #expect(found.flags == [2, 2] && found.marked[0] == [0, 1, 9])
        #expect(found.marked[1] == Array(0..<256) + [1171])

        found = try change(device, around, "first", [.clear])
        #expect(found.names == ["first", "second"] && found.marked[0] == [])

        found = try change(device, around, "first", [.remove])
        #expect(found.names == ["second"] && found.marked == [Array(0..<256) + [1171]])

        found = try change(device, around, "second", [.remove])
        #expect(found.names == [])

        found = try change(device, around, "again", [.add(granularity: nil)], writing: 4096)
        #expect(found.names == ["again"] && found.flags == [2] && found.marked == [[1]])
    }

    @Test("A header without room for the bitmaps is left as it is, and says so")
    func noRoom() throws {
        let around = Surroundings(fill: 3960)
        let bytes = around.builder().build()
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        #expect(throws: ImageError.self) {
            try image.changeBitmap(Array("big".utf8), [.add(granularity: nil)])
            try image.close()
        }
        try device.bytes.withUnsafeBytes { raw in
            let reader = try ReferenceReader(raw)
            #expect(try reader.bitmaps().isEmpty && reader.audit().faults == [])
            #expect(try reader.extensions().map(\.data.count) == [3960])
        }
    }

    @Test("What cannot be done is refused before anything is written")
    func refused() throws {
        var builder = Surroundings().builder()
        builder.bitmap("there", bits: [1])
        let device = RecordingDevice(builder.build(), yielding: false)
        let before = device.bytes
        let image = try Image.open(device)
        let wrong: [(String, [BitmapChange])] = [
            ("there", [.add(granularity: nil)]), ("", [.add(granularity: nil)]),
            (String(repeating: "n", count: 1024), [.add(granularity: nil)]),
            ("new", [.add(granularity: 256)]), ("new", [.add(granularity: 4 << 30)]),
            ("new", [.add(granularity: 3 * 512)]), ("new", [.remove]), ("new", [.clear]),
            ("new", [.enable]), ("new", [.disable]),
            ("there", [.merge(source: "nobody", path: nil)]),
            ("there", [.clear, .merge(source: "nobody", path: nil)]),
        ]
        for (name, changes) in wrong {
            #expect(throws: ImageError.self, "\(name.prefix(8)) \(changes)") {
                try image.changeBitmap(Array(name.utf8), changes)
            }
        }
        try image.close()
        #expect(device.bytes == before)
    }
}
