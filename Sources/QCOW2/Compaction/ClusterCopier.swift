/// Copies clusters and streams to free places of the same file.
final class ClusterCopier {
    /// What is copied in one go.
    enum Item {
        case clusters(CompactionPlan.Move)
        /// Streams that keep their distances.
        case streams([StreamMove])
    }

    /// Bytes of an item, if it need not be more.
    private static let pieceByteCount: UInt64 = 2 << 20

    private let file: HostFile
    private let clusterBits: UInt64
    private let key: CompactionKey?
    /// What is not encrypted of an encrypted image.
    private let metadata: Set<UInt64>
    private let buffer: UnsafeMutableRawBufferPointer

    init(_ file: HostFile, _ survey: CompactionSurvey, _ key: CompactionKey?) {
        self.file = file
        self.key = key
        clusterBits = survey.clusterBits
        metadata = key == nil ? [] : survey.metadata
        buffer = .allocate(byteCount: Int(Self.pieceByteCount), alignment: 4096)
    }

    deinit { buffer.deallocate() }

    // MARK: Items

    /// The host offset of an item, and how many bytes it has.
    func extent(of item: Item) -> (source: UInt64, target: UInt64, byteCount: UInt64) {
        switch item {
        case .clusters(let move):
            return (
                move.source &<< clusterBits, move.target &<< clusterBits,
                move.count &<< clusterBits
            )
        case .streams(let streams):
            guard let first = streams.first else { return (0, 0, 0) }
            let end = streams.reduce(0) { max($0, $1.stream.end) }
            return (first.stream.offset, first.target, end &- first.stream.offset)
        }
    }

    func items(of plan: CompactionPlan) -> [Item] {
        plan.moves.flatMap(items) + items(of: plan.streams)
    }

    private func items(of move: CompactionPlan.Move) -> [Item] {
        if move.isTable { return [.clusters(move)] }
        let most = max(Self.pieceByteCount &>> clusterBits, 1)
        return stride(from: 0, to: move.count, by: Int(most)).map { done in
            .clusters(
                CompactionPlan.Move(
                    source: move.source &+ done, target: move.target &+ done,
                    count: min(most, move.count &- done)))
        }
    }

    private func items(of streams: [StreamMove]) -> [Item] {
        var parts: [[StreamMove]] = []
        for stream in streams {
            if let first = parts.last?.first, first.shift == stream.shift,
                stream.stream.end &- first.stream.offset <= Self.pieceByteCount
            {
                parts[parts.count - 1].append(stream)
            } else {
                parts.append([stream])
            }
        }
        return parts.map(Item.streams)
    }

    // MARK: Bytes

    func copy(_ item: Item) throws(ImageError) {
        let (source, target, byteCount) = extent(of: item)
        guard case .clusters(let move) = item, let key else {
            return try copyStored(source, to: target, byteCount)
        }
        for number in 0..<move.count {
            let done = number &<< clusterBits
            if metadata.contains(move.source &+ number) {
                try copyStored(source &+ done, to: target &+ done, 1 &<< clusterBits)
            } else {
                try copyEncrypted(source &+ done, to: target &+ done, key)
            }
        }
    }

    /// Copies bytes as they are; holes become holes.
    private func copyStored(
        _ source: UInt64, to target: UInt64, _ byteCount: UInt64
    ) throws(ImageError) {
        var done: UInt64 = 0
        while done < byteCount {
            let hole = try holeByteCount(at: source &+ done, limit: byteCount &- done)
            if hole > 0 { try file.unmap(target &+ done..<target &+ done &+ hole) }
            done &+= hole
            let count = min(byteCount &- done, UInt64(buffer.count))
            guard count > 0 else { return }
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(count)])
            try file.read(into: part, at: source &+ done)
            try file.write(UnsafeRawBufferPointer(part), at: target &+ done)
            done &+= count
        }
    }

    private func holeByteCount(at offset: UInt64, limit: UInt64) throws(ImageError) -> UInt64 {
        do throws(SystemError) {
            guard let data = try file.device.nextData(from: offset) else { return limit }
            return min(data &- offset, limit)
        } catch {
            throw ImageError(
                .system(error, operation: "cannot look for data at \(offset)"), file: file.name)
        }
    }

    /// A sector is encrypted according to its place.
    private func copyEncrypted(
        _ source: UInt64, to target: UInt64, _ key: CompactionKey
    ) throws(ImageError) {
        let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<(1 &<< Int(clusterBits))])
        let data = try key.data()
        try data.read(into: part, at: source, guest: 0, of: file)
        try data.write(UnsafeRawBufferPointer(part), at: target, to: file)
    }
}

extension StreamMove {
    /// What is added to a place, modulo 2^64.
    fileprivate var shift: UInt64 { target &- stream.offset }
}
