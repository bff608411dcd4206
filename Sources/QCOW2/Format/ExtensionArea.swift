/// Where the header extensions stand in an image's first cluster.
package struct ExtensionArea: Sendable {
    package struct Record: Sendable {
        package var type: UInt32
        /// Where the type stands, in bytes from the start of the image; the length and the data
        /// follow.
        package var offset: Int
        /// Bytes of the data.
        package var byteCount: Int

        package var dataOffset: Int { offset + 8 }
        /// Where the next record begins.
        package var end: Int { dataOffset + (byteCount + 7) & ~7 }
    }

    package private(set) var records: [Record] = []
    /// Where the next record would begin; the end marker stands there.
    package let end: Int
    /// Whether an end marker stands at `end`.
    package let hasEndMarker: Bool
    /// The backing file's name; empty at the cluster's end where there is none.
    package let backingName: Range<Int>
    package let clusterByteCount: Int

    /// - Parameters:
    ///   - cluster: The first cluster of an image, whose header `header` is.
    package init(_ cluster: UnsafeRawBufferPointer, _ header: Header) {
        clusterByteCount = Int(header.clusterByteCount)
        let start = Int(cluster.bigEndian(at: 8, as: UInt64.self) ?? 0)
        let count = Int(cluster.bigEndian(at: 16, as: UInt32.self) ?? 0)
        backingName = start == 0 ? clusterByteCount..<clusterByteCount : start..<start + count
        let limit = min(backingName.lowerBound, cluster.count)
        var offset = Int(header.byteCount)
        var isMarked = false
        while offset + 8 <= limit, let type = cluster.bigEndian(at: offset, as: UInt32.self) {
            isMarked = type == HeaderExtension.end
            if isMarked { break }
            let length = Int(cluster.bigEndian(at: offset + 4, as: UInt32.self) ?? 0)
            let record = Record(type: type, offset: offset, byteCount: length)
            records.append(record)
            offset = record.end
        }
        end = offset
        // A file that ends in its header has zeros behind it.
        hasEndMarker = isMarked || offset >= cluster.count
    }

    package func record(of type: UInt32) -> Record? { records.first { $0.type == type } }
}
