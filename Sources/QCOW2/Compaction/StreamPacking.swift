/// A stream and where it goes; its place within a sector stays, so its length does too.
struct StreamMove {
    var stream: CompactionSurvey.Stream
    var target: UInt64
}

/// Lays streams out one behind the other in free runs, the longest run first: what is left at the
/// end of a run is lost.
struct StreamPacking {
    private let survey: CompactionSurvey
    private let maximum: UInt64
    private let clusterBits: UInt64
    /// References to the clusters that were given out.
    private var counts: [UInt64: UInt64] = [:]

    init(_ survey: CompactionSurvey) {
        self.survey = survey
        maximum = RefcountFormat(order: survey.header.refcountOrder).maximum
        clusterBits = survey.clusterBits
    }

    /// Where streams that ascend go; where there is too little room the lowest ones stay.
    mutating func pack(
        _ streams: [CompactionSurvey.Stream], into free: inout FreeSpace
    ) -> [StreamMove] {
        // Nobody knows how much is lost before it is tried.
        for eighth in 0..<8 {
            var space = free
            counts = [:]
            let part = streams.dropFirst(streams.count * eighth / 8)
            if let moves = place(part, in: &space) {
                free = space
                return moves
            }
        }
        return []
    }

    private mutating func place(
        _ streams: ArraySlice<CompactionSurvey.Stream>, in free: inout FreeSpace
    ) -> [StreamMove]? {
        var rest = streams
        var moves: [StreamMove] = []
        let order = free.runs.indices.sorted {
            (free.runs[$1].count, $0) < (free.runs[$0].count, $1)
        }
        for index in order where !rest.isEmpty {
            let end = fill(free.runs[index], with: &rest, &moves)
            free.takeFront(end &- free.runs[index].first, ofRunAt: index)
        }
        return rest.isEmpty ? moves : nil
    }

    /// Streams that overlap, or follow one another, at the same distance from their old places.
    private struct Group {
        /// What is added to a place, modulo 2^64.
        var shift: UInt64
        /// The end of the old places.
        var end: UInt64

        var target: UInt64 { end &+ shift }
    }

    /// Puts as many streams into a run as it holds; returns the end of the clusters used.
    private mutating func fill(
        _ run: ClusterRun, with rest: inout ArraySlice<CompactionSurvey.Stream>,
        _ moves: inout [StreamMove]
    ) -> UInt64 {
        let room = run.first &<< clusterBits..<run.end &<< clusterBits
        var group: Group?
        while let stream = rest.first {
            guard let target = target(of: stream, behind: group, in: room) else { break }
            for cluster in clusters(stream, at: target) {
                counts[cluster, default: 0] &+= stream.count
            }
            moves.append(StreamMove(stream: stream, target: target))
            let shift = target &- stream.offset
            let end = group?.shift == shift ? group?.end ?? 0 : 0
            group = Group(shift: shift, end: max(end, stream.end))
            rest = rest.dropFirst()
        }
        guard let group else { return run.first }
        return (group.target &- 1) &>> clusterBits &+ 1
    }

    /// The place behind the streams before, among them where they share bytes; in a cluster of its
    /// own where a count would not fit its bits.
    private func target(
        of stream: CompactionSurvey.Stream, behind group: Group?, in room: Range<UInt64>
    ) -> UInt64? {
        let inSector = stream.offset & 511
        var target = (group?.target ?? room.lowerBound) &+ inSector
        if let group, stream.offset < group.end { target = stream.offset &+ group.shift }
        while target &+ stream.byteCount <= room.upperBound {
            let isFull = clusters(stream, at: target).contains {
                counts[$0, default: 0] &+ stream.count > maximum
            }
            if !isFull { return target }
            let last = max(target, (group?.target ?? 1) &- 1)
            target = (last &>> clusterBits &+ 1) &<< clusterBits &+ inSector
        }
        return nil
    }

    private func clusters(
        _ stream: CompactionSurvey.Stream, at target: UInt64
    ) -> ClosedRange<UInt64> {
        target &>> clusterBits...(target &+ stream.byteCount &- 1) &>> clusterBits
    }
}
