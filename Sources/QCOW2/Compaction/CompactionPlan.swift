/// Which clusters go where.
///
/// With U clusters in use the file can end behind the first U: what lies beyond goes into what is
/// free before, in the same order, so that runs stay runs.  Tables of several clusters go first,
/// because they need room in one piece; compressed streams next, a stream at a time, because they
/// need not keep to clusters; the rest fills what is left.
struct CompactionPlan {
    /// Clusters that keep their order.
    struct Move: Equatable {
        var source: UInt64
        var target: UInt64
        var count: UInt64
        /// Whether they are one table, which moves as a whole.
        var isTable = false
    }

    private(set) var moves: [Move] = []
    private(set) var streams: [StreamMove] = []

    private let survey: CompactionSurvey
    /// The clusters in use, without the tables that will be given up.
    private let used: [ClusterRun]
    /// Clusters that are about to be free, and are not yet: tables that say nothing.
    private let emptyTables: Set<UInt64>
    /// Likewise: refcount blocks that will count nothing.
    private let idleBlocks: Set<UInt64>
    /// Where the file could end this time.
    private let goal: UInt64

    init(_ survey: CompactionSurvey) throws(ImageError) {
        self.survey = survey
        let empty = Set(survey.emptyTables.map { $0 &>> survey.clusterBits })
        emptyTables = empty
        used = Self.usedRuns(survey, without: empty)
        let need = Self.need(survey, used)
        idleBlocks = need.idleBlocks
        goal = Self.goal(need.clusterCount, besides: empty.union(need.idleBlocks))
        try plan()
    }

    /// Bytes to be copied.
    var byteCount: UInt64 {
        moves.reduce(0) { $0 &+ $1.count } &<< survey.clusterBits
            &+ streams.reduce(0) { $0 &+ $1.stream.byteCount }
    }

    /// Whether nothing is to be moved or given up, so that at most the file's end is to be cut off.
    var isEmpty: Bool {
        moves.isEmpty && streams.isEmpty && idleBlocks.isEmpty && survey.emptyTables.isEmpty
    }

    /// The highest cluster in use for which `isLeft` is true; 0 where there is none.
    func highestCluster(where isLeft: (UInt64) -> Bool) -> UInt64 {
        for run in used.reversed() {
            for cluster in (run.first..<run.end).reversed() where isLeft(cluster) {
                return cluster
            }
        }
        return 0
    }

    // MARK: What there is

    private static func usedRuns(
        _ survey: CompactionSurvey, without empty: Set<UInt64>
    ) -> [ClusterRun] {
        var runs: [ClusterRun] = []
        survey.counts.forEach { cluster, _ in
            if !empty.contains(cluster) {
                runs.append(joining: ClusterRun(first: cluster, count: 1))
            }
        }
        return runs
    }

    /// How many clusters will be needed, those of blocks that count them included.
    private static func need(
        _ survey: CompactionSurvey, _ used: [ClusterRun]
    ) -> (clusterCount: UInt64, idleBlocks: Set<UInt64>) {
        let other = used.reduce(0) { $0 &+ $1.count } &- UInt64(survey.blocks.count)
        var last: UInt64 = 0
        while true {
            let count = other &+ UInt64(survey.blocks.prefix { $0.index <= last }.count)
            let block = survey.stored.blockIndex(of: max(count, 1) &- 1)
            guard block > last else {
                return (count, Set(survey.blocks.drop { $0.index <= last }.map(\.cluster)))
            }
            last = block
        }
    }

    /// Where the needed clusters end as long as others among them are not free yet.
    private static func goal(_ count: UInt64, besides releasing: Set<UInt64>) -> UInt64 {
        var goal = count
        for cluster in releasing.sorted() {
            if cluster >= goal { break }
            goal &+= 1
        }
        return goal
    }

    private func isCounted(_ cluster: UInt64) -> Bool {
        survey.stored.blockOffset(survey.stored.blockIndex(of: cluster)) != 0
    }

    /// Free clusters that have a count, below the goal and between it and the end.
    private func freeSpace() -> (low: FreeSpace, high: FreeSpace) {
        var (low, high) = (FreeSpace(), FreeSpace())
        var start: UInt64 = 0
        for run in used {
            for cluster in start..<run.first
            where isCounted(cluster) && !emptyTables.contains(cluster) {
                if cluster < goal { low.append(cluster) } else { high.append(cluster) }
            }
            start = run.end
        }
        return (low, high)
    }

    // MARK: Where everything goes

    private mutating func plan() throws(ImageError) {
        guard let end = used.last?.end, end > goal else { return }
        var (low, high) = freeSpace()
        var staying = Set(survey.fixed.flatMap { $0.first..<$0.end })
        staying.formUnion(idleBlocks)
        let tables = survey.tables.map(survey.run).filter { $0.count > 1 && $0.end > goal }
        for table in tables.sorted(by: { $0.count > $1.count }) {
            staying.formUnion(table.first..<table.end)
            let target =
                low.take(table.count, below: table.first)
                ?? high.take(table.count, below: table.first)
            guard let target else { continue }
            moves.append(
                Move(source: table.first, target: target, count: table.count, isTable: true))
        }
        let tail = try survey.streams(from: goal)
        try survey.checkStreams(tail, from: goal)
        for stream in tail { staying.formUnion(survey.clusters(of: stream)) }
        var packing = StreamPacking(survey)
        streams = packing.pack(tail, into: &low)
        fill(low, besides: staying)
        moves.sort { $0.source < $1.source }
    }

    /// Moves single clusters; where there is too little room the lowest ones stay.
    private mutating func fill(_ low: FreeSpace, besides staying: Set<UInt64>) {
        var tail: [UInt64] = []
        for run in used where run.end > goal {
            for cluster in max(run.first, goal)..<run.end where !staying.contains(cluster) {
                tail.append(cluster)
            }
        }
        let free = low.clusters
        let count = min(tail.count, free.count)
        for (source, target) in zip(tail.suffix(count), free) {
            if let last = moves.last, !last.isTable, last.source &+ last.count == source,
                last.target &+ last.count == target
            {
                moves[moves.count - 1].count &+= 1
            } else {
                moves.append(Move(source: source, target: target, count: 1))
            }
        }
    }
}

/// Free clusters, in runs that ascend.
struct FreeSpace {
    private(set) var runs: [ClusterRun] = []

    mutating func append(_ cluster: UInt64) {
        runs.append(joining: ClusterRun(first: cluster, count: 1))
    }

    /// Every free cluster, ascending.
    var clusters: [UInt64] { runs.flatMap { $0.first..<$0.end } }

    /// Takes the first `count` clusters in one piece that end at `limit` at the latest.
    mutating func take(_ count: UInt64, below limit: UInt64) -> UInt64? {
        let found = runs.firstIndex { $0.count >= count && $0.first &+ count <= limit }
        guard let found else { return nil }
        let first = runs[found].first
        takeFront(count, ofRunAt: found)
        return first
    }

    /// Takes clusters off the front of a run.
    mutating func takeFront(_ count: UInt64, ofRunAt index: Int) {
        runs[index].first &+= count
        runs[index].count &-= count
    }
}
