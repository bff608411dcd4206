internal import Foundation

/// QEMU's tools, the last word on what an image holds.
package enum QemuImg {
    package static let isThere = TestEnvironment.has("qemu-img", "qemu-io")

    /// Makes an image; `options` as in `-o`, `size` as qemu-img takes it.
    package static func create(
        _ path: String, size: Int? = nil, options: [String] = [], backing: String? = nil,
        backingFormat: String = "qcow2"
    ) throws {
        var words = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if !options.isEmpty { words += ["-o", options.joined(separator: ",")] }
        if let backing { words += ["-b", backing, "-F", backingFormat] }
        words.append(path)
        if let size { words.append("\(size)") }
        try Command.require(words)
    }

    /// Runs qemu-io's commands in one process.
    @discardableResult
    package static func io(
        _ path: String, _ commands: [String], format: String = "qcow2", flags: [String] = []
    ) throws -> String {
        try Command.require(
            ["qemu-io", "-f", format] + flags + commands.flatMap { ["-c", $0] } + [path])
    }

    package static func convert(
        _ source: String, to target: String, from: String = "raw", format: String = "qcow2",
        flags: [String] = []
    ) throws {
        try Command.require(
            ["qemu-img", "convert", "-q", "-f", from, "-O", format] + flags + [source, target],
            timeout: 600)
    }

    package static func snapshot(_ path: String, create name: String) throws {
        try Command.require("qemu-img", "snapshot", "-q", "-c", name, path)
    }

    /// qemu-img's exit status: 0 clean, 2 corruptions, 3 leaks; and its words.
    package static func check(_ path: String) throws -> Command.Result {
        try Command.run(["qemu-img", "check", "-f", "qcow2", path], timeout: 600)
    }

    /// Nil where qemu-img says that both hold the same; its words where not.
    package static func difference(
        _ raw: String, _ image: String, imageFormat: String = "qcow2"
    ) throws -> String? {
        let result = try Command.run(
            ["qemu-img", "compare", "-f", "raw", "-F", imageFormat, raw, image], timeout: 600)
        return result.status == 0 ? nil : result.description
    }

    package struct Extent: Decodable, Sendable {
        package let start: Int
        package let length: Int
        package let zero: Bool
        package let data: Bool
        package let depth: Int
    }

    package static func map(_ path: String) throws -> [Extent] {
        try map(of: ["-f", "qcow2", path])
    }

    /// - Parameter words: the image, and how it is to be opened.
    private static func map(of words: [String]) throws -> [Extent] {
        let json = try Command.require(["qemu-img", "map", "--output=json"] + words)
        return try JSONDecoder().decode([Extent].self, from: Data(json.utf8))
    }

    /// The ranges that are no holes, ascending, neighbours joined.
    package static func dataRanges(_ path: String) throws -> [Range<Int>] {
        try dataRanges(of: ["-f", "qcow2", path])
    }

    /// - Parameter words: the image, and how it is to be opened.
    static func dataRanges(of words: [String]) throws -> [Range<Int>] {
        var ranges: [Range<Int>] = []
        for extent in try map(of: words) where !(extent.zero && !extent.data) {
            let range = extent.start..<extent.start + extent.length
            if let last = ranges.last, last.upperBound == range.lowerBound {
                ranges[ranges.count - 1] = last.lowerBound..<range.upperBound
            } else {
                ranges.append(range)
            }
        }
        return ranges
    }

    /// What qemu-img info tells of an image.
    package struct Info: Decodable, Sendable {
        package struct Snapshot: Decodable, Sendable { package let name: String }

        package struct Bitmap: Decodable, Sendable {
            package let name: String
            package let granularity: Int
            /// Ascending.
            package let flags: [String]

            package init(from decoder: any Decoder) throws {
                let all = try decoder.container(keyedBy: CodingKeys.self)
                name = try all.decode(String.self, forKey: .name)
                granularity = try all.decode(Int.self, forKey: .granularity)
                flags = try all.decode([String].self, forKey: .flags).sorted()
            }

            private enum CodingKeys: String, CodingKey { case name, granularity, flags }
        }

        package let byteCount: Int
        package var snapshots: [Snapshot] { allSnapshots ?? [] }
        package var bitmaps: [Bitmap] { specific.data.bitmaps ?? [] }

        private let allSnapshots: [Snapshot]?
        private let specific: Specific

        private struct Specific: Decodable, Sendable { let data: Facts }
        private struct Facts: Decodable, Sendable { let bitmaps: [Bitmap]? }
        private enum CodingKeys: String, CodingKey {
            case byteCount = "virtual-size"
            case allSnapshots = "snapshots"
            case specific = "format-specific"
        }
    }

    package static func info(_ path: String) throws -> Info {
        let json = try Command.require("qemu-img", "info", "-U", "--output=json", path)
        return try JSONDecoder().decode(Info.self, from: Data(json.utf8))
    }
}
