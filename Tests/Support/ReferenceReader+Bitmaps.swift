/// The bitmaps of an image, as the tests' own reader sees them.
extension ReferenceReader {
    package struct Bitmap: Sendable {
        package let name: String
        package let flags: UInt32
        package let type: UInt8
        package let granularity: Int
        package let extra: [UInt8]
        /// Numbers of the granules that are marked, ascending.
        package let marked: [Int]

        package var isInUse: Bool { flags & 1 == 1 }

        package func marks(_ offset: Int) -> Bool { marked.contains(offset / granularity) }
    }

    /// Where the bitmaps extension's data stands in the file, nil without one.
    package func bitmapsExtension() throws(Fault) -> [UInt8]? {
        try extensions().first { $0.type == 0x2385_2875 }?.data
    }

    /// The bitmaps that may be believed to be there: none where the feature bit says so.
    package func bitmaps() throws(Fault) -> [Bitmap] {
        guard autoclearFeatures & 1 == 1, let data = try bitmapsExtension() else { return [] }
        let directory = Int(truncatingIfNeeded: data.number(at: 16, as: UInt64.self))
        let end = directory + Int(truncatingIfNeeded: data.number(at: 8, as: UInt64.self))
        var position = directory
        var found: [Bitmap] = []
        for _ in 0..<data.number(at: 0, as: UInt32.self) {
            let nameLength = Int(bytes.number(at: position + 18, as: UInt16.self))
            let extraLength = Int(bytes.number(at: position + 20, as: UInt32.self))
            let name = position + 24 + extraLength
            found.append(
                Bitmap(
                    name: String(decoding: raw(name, nameLength), as: UTF8.self),
                    flags: bytes.number(at: position + 12, as: UInt32.self),
                    type: bytes.number(at: position + 16, as: UInt8.self),
                    granularity: 1 << Int(bytes.number(at: position + 17, as: UInt8.self)),
                    extra: raw(position + 24, extraLength),
                    marked: try marked(by: position)))
            position += (24 + extraLength + nameLength + 7) / 8 * 8
        }
        guard position == end else { throw Fault("the bitmap directory has another length") }
        return found
    }

    private func marked(by entry: Int) throws(Fault) -> [Int] {
        let table = Int(truncatingIfNeeded: number(entry))
        let count = Int(bytes.number(at: entry + 8, as: UInt32.self))
        let granularity = 1 << Int(bytes.number(at: entry + 17, as: UInt8.self))
        let granules = (byteCount + granularity - 1) / granularity
        let isInUse = bytes.number(at: entry + 12, as: UInt32.self) & 1 == 1
        if !isInUse,
            count != (granules + clusterSize * 8 - 1) / (clusterSize * 8)
        {
            throw Fault("a bitmap's table has \(count) entries for \(granules) granules")
        }
        var marked: [Int] = []
        for index in 0..<count {
            let part = number(table + index * 8)
            if part == 0 { continue }
            for position in 0..<clusterSize {
                let byte =
                    part == 1 ? 0xff : bytes.number(at: Int(part) + position, as: UInt8.self)
                if byte == 0 { continue }
                for bit in 0..<8 where byte >> bit & 1 == 1 {
                    let granule = (index * clusterSize + position) * 8 + bit
                    guard granule < granules || part == 1 || isInUse else {
                        throw Fault("a bit behind the disk's end is set")
                    }
                    if granule < granules { marked.append(granule) }
                }
            }
        }
        return marked
    }
}
