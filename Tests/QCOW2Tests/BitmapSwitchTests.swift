import QCOW2
import TestSupport
import Testing

/// How a header comes to point to another bitmap directory: write by write.
@Suite("Switching bitmap directories")
struct BitmapSwitchTests {
    /// What else stands in a header: the bytes of another extension's data, and of a name.
    struct Surroundings: Sendable, CustomTestStringConvertible {
        var fill: Int?
        var nameLength = 0
        /// Whether the name follows the extensions without an end marker between them.
        var endsWithName = false

        var testDescription: String {
            "\(fill ?? -1) bytes, a name of \(nameLength)\(endsWithName ? " at once" : "")"
        }

        var name: String? { nameLength > 0 ? String(repeating: "b", count: nameLength) : nil }

        func image() -> [UInt8] {
            var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 12)
            if let fill { builder.extensions = [(0x1234_5678, [UInt8](repeating: 7, count: fill))] }
            builder.backingName = name
            var bytes = builder.build()
            if endsWithName {
                let place = 112 + (fill.map { 8 + ($0 + 7) / 8 * 8 } ?? 0)
                bytes.put(Array((name ?? "").utf8) + [UInt8](repeating: 0, count: 8), at: place)
                bytes.put(UInt64(place), at: 8)
            }
            return bytes
        }
    }

    static let all: [Surroundings] =
        [Surroundings()]
        + stride(from: 320, through: 408, by: 8).flatMap { fill in
            [0, 1, 9, 40, 700].map { Surroundings(fill: fill, nameLength: $0) }
        }
        + [nil, 0, 8, 301, 344, 352, 376].map {
            Surroundings(fill: $0, nameLength: 5, endsWithName: true)
        }

    static let first = BitmapsExtension(
        count: 1, directoryByteCount: 0x0102_0304, directoryOffset: 0x0011_0000)
    static let second = BitmapsExtension(
        count: 2, directoryByteCount: 0x0005_0607, directoryOffset: 0x0022_0000)

    func header(_ bytes: [UInt8]) throws -> Header {
        try bytes.withUnsafeBytes {
            try Header.parse(UnsafeRawBufferPointer(rebasing: $0[..<4096]))
        }
    }

    /// Points the header to `directory`; returns the bytes after each write, all synced in turn.
    func point(_ bytes: [UInt8], to directory: BitmapsExtension?) throws -> [[UInt8]] {
        let device = RecordingDevice(bytes, yielding: false)
        let file = try HostFile(device)
        let sector = try HeaderSector(of: file)
        try BitmapSwitch(file: file, sector: sector, header: header(bytes)).point(to: directory)
        #expect(sector.isDirty == false)
        var states = [bytes]
        var isSynced = true
        for moment in device.moments {
            switch moment {
            case .write(_, let offset, let bytes):
                #expect(isSynced, "a write that does not wait for the one before")
                states.append(states[states.count - 1])
                states[states.count - 1].put(bytes, at: offset)
                isSynced = false
            case .flushed: isSynced = true
            default: break
            }
        }
        #expect(isSynced)
        return states
    }

    @Test("Every state on the way has the old directory, the new one, or none", arguments: all)
    func everyState(_ around: Surroundings) throws {
        var bytes = around.image()
        var old: BitmapsExtension?
        for new in [Self.first, Self.second, nil, Self.second, Self.first, nil, nil, Self.first] {
            let states = try point(bytes, to: new)
            for state in states {
                let header = try header(state)
                let isValid = header.autoclearFeatures.contains(.bitmaps)
                #expect(!isValid || header.bitmaps != nil)
                let found = isValid ? header.bitmaps : nil
                #expect(found == old || found == new || found == nil)
                #expect(header.backingFile == around.name)
                let others = header.extensions.filter { $0.type == 0x1234_5678 }
                #expect(
                    others.map(\.data)
                        == (around.fill.map { [[UInt8](repeating: 7, count: $0)] } ?? []))
            }
            bytes = try #require(states.last)
            let header = try header(bytes)
            #expect(header.bitmaps == new)
            #expect(header.autoclearFeatures.contains(.bitmaps) == (new != nil))
            #expect(bytes.count == states[0].count)
            old = new
        }
    }

    @Test("One write switches within a sector, any one; across two it takes three")
    func writes() throws {
        func count(_ fill: Int) throws -> [Int] {
            var bytes = Surroundings(fill: fill).image()
            return try [Self.first, Self.second, nil, nil, Self.first].map { directory in
                let states = try point(bytes, to: directory)
                bytes = try #require(states.last)
                return states.count - 1
            }
        }
        // Data, type, bit; the new directory; bit, type; nothing; data, type, bit.
        #expect(try count(8) == [3, 1, 2, 0, 3])
        // The data ends with the sector, or 8 bytes behind it: its end is a write of its own.
        #expect(try count(512 - 112 - 8 - 32) == [4, 1, 2, 0, 4])
        #expect(try count(512 - 112 - 8 - 24) == [4, 4, 2, 0, 4])
        // All of it behind the first sector.
        #expect(try count(600) == [3, 1, 2, 0, 3])
    }

    @Test("A short name makes room in the same write")
    func makesRoomAtOnce() throws {
        let states = try point(Surroundings(fill: 8, nameLength: 5).image(), to: Self.first)
        #expect(states.count == 3)
        #expect(try header(states[1]).bitmaps == Self.first)
        #expect(try header(states[1]).backingFileOffset == 112 + 16 + 40)
    }

    @Test("A bit that has no extension is cleared before one is made")
    func bitAlone() throws {
        var bytes = Surroundings().image()
        bytes.put(UInt64(1), at: 88)
        let states = try point(bytes, to: Self.first)
        #expect(states.count == 5)
        #expect(try !header(states[1]).autoclearFeatures.contains(.bitmaps))
        #expect(try header(states[4]).autoclearFeatures.contains(.bitmaps))
        #expect(try point(bytes, to: nil).count == 2)
    }

    @Test("A name that is just far enough away stays")
    func exactRoom() throws {
        var bytes = Surroundings(nameLength: 5).image()
        for (place, stays) in [(152, true), (151, false), (153, true)] {
            bytes.put(Array("bbbbb".utf8), at: place)
            bytes.put(UInt64(place), at: 8)
            let last = try header(try #require(try point(bytes, to: Self.first).last))
            #expect((last.backingFileOffset == UInt64(place)) == stays, "\(place)")
            #expect(last.backingFile == "bbbbb" && last.bitmaps == Self.first)
        }
    }

    @Test("A record between others is left as room, which the next one takes")
    func leavesRoom() throws {
        var bytes = try #require(try point(Surroundings().image(), to: Self.first).last)
        // Another program appends an extension.
        bytes.put(UInt32(0x1234_5678), at: 112 + 32)
        bytes.put(UInt32(8), at: 112 + 36)
        bytes.put(UInt64(9), at: 112 + 40)
        bytes.put(UInt64(0), at: 112 + 48)
        bytes = try #require(try point(bytes, to: nil).last)
        #expect(try header(bytes).extensions.map(\.data.count) == [24, 8])
        #expect(bytes.number(at: 112, as: UInt32.self) == 0x5155_4e55)
        let states = try point(bytes, to: Self.second)
        #expect(states.count == 4)
        bytes = try #require(states.last)
        #expect(try header(bytes).extensions.map(\.type) == [0x2385_2875, 0x1234_5678])
        #expect(try header(bytes).bitmaps == Self.second)
    }

    @Test("A header without room is left as it is", arguments: [3928, 3936, 3944, 3952])
    func noRoom(fill: Int) throws {
        // 112 bytes, the record's 8, and 40 for the new one with the end marker.
        let fits = 112 + 8 + fill + 40 <= 4096
        let bytes = Surroundings(fill: fill).image()
        if fits {
            #expect(
                try header(#require(try point(bytes, to: Self.first).last)).bitmaps == Self.first)
        } else {
            #expect(throws: ImageError.self) { try point(bytes, to: Self.first) }
        }
    }

    @Test("The place of each extension and of the name is known, end marker or not")
    func area() throws {
        func area(_ around: Surroundings, fileEnd: Int = 4096) throws -> ExtensionArea {
            let bytes = around.image()
            let header = try header(bytes)
            return bytes.withUnsafeBytes {
                ExtensionArea(UnsafeRawBufferPointer(rebasing: $0[..<fileEnd]), header)
            }
        }
        let none = try area(Surroundings())
        #expect(none.records.isEmpty && none.end == 112 && none.hasEndMarker)
        #expect(none.backingName == 4096..<4096 && none.clusterByteCount == 4096)
        let one = try area(Surroundings(fill: 13, nameLength: 3))
        let record = try #require(one.record(of: 0x1234_5678))
        #expect(record.offset == 112 && record.dataOffset == 120 && record.byteCount == 13)
        #expect(record.end == 136 && one.end == 136 && one.hasEndMarker)
        #expect(one.backingName == 144..<147 && one.record(of: 1) == nil)
        let full = try area(Surroundings(fill: 16, nameLength: 3, endsWithName: true))
        #expect(full.end == 136 && !full.hasEndMarker && full.backingName == 136..<139)
        let bare = try area(Surroundings(nameLength: 3, endsWithName: true))
        #expect(bare.end == 112 && !bare.hasEndMarker && bare.backingName == 112..<115)
        // Behind a file's end are zeros.
        #expect(try area(Surroundings(fill: 13), fileEnd: 136).hasEndMarker)
    }
}
