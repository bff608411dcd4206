/// What is left where it was once references have moved.
struct CompactionRest {
    /// The clusters that the file needs.
    private(set) var end: UInt64
    /// Refcount blocks that count nothing any more, in the order in which they go.
    let idleBlocks: IdleBlocks
    /// The counts that are left of clusters from which streams have gone.
    let streamCounts: [UInt64: UInt64]
    /// Clusters from which everything has gone.
    let movedClusterCount: UInt64
    private let clusterBits: UInt64

    var byteCount: UInt64 { end &<< clusterBits }

    init(
        _ survey: CompactionSurvey, _ plan: CompactionPlan, _ relocation: Relocation,
        _ streams: [StreamMove]
    ) {
        clusterBits = survey.clusterBits
        var counts: [UInt64: UInt64] = [:]
        for stream in streams {
            for cluster in survey.clusters(of: stream.stream) {
                counts[cluster, default: survey.counts.count(of: cluster)] &-= stream.stream.count
            }
        }
        streamCounts = counts
        movedClusterCount =
            relocation.movedClusterCount &+ UInt64(counts.values.lazy.filter { $0 == 0 }.count)
        let blockClusters = Set(survey.blocks.map(\.cluster))
        var last = max(
            relocation.highestTarget,
            plan.highestCluster { cluster in
                !blockClusters.contains(cluster) && counts[cluster] != 0
                    && relocation.place(of: cluster) == cluster
            })
        let blocks = survey.blocks.map { block in
            IdleBlocks.Block(index: block.index, cluster: relocation.place(of: block.cluster))
        }
        while true {
            let needed = survey.stored.blockIndex(of: last)
            let highest = blocks.lazy.filter { $0.index <= needed }.map(\.cluster).max() ?? 0
            if highest <= last { break }
            last = highest
        }
        let needed = survey.stored.blockIndex(of: last)
        let idleBlocks = IdleBlocks(
            Array(blocks.drop { $0.index <= needed }), blockBits: survey.stored.blockBits)
        let left = blocks.lazy.filter { !idleBlocks.contains($0.index) }.map(\.cluster).max()
        self.idleBlocks = idleBlocks
        end = max(last, left ?? 0) &+ 1
    }
}

/// Refcount blocks that count nothing but one another.
///
/// While the table leads to a block, that one's own count has to be there.  So a block goes after
/// those that it counts, a sync between, or in the same sector of the table.
struct IdleBlocks {
    struct Block: Equatable {
        var index: UInt64
        var cluster: UInt64
    }

    private(set) var blocks: [Block] = []
    /// Entries of the refcount table that are cleared together.
    private(set) var rounds: [[Range<UInt64>]] = []
    private var indices: Set<UInt64> = []

    /// Syncs that are spent at once; what is left goes the next time.
    private static let roundLimit = 64
    private static let entriesPerSector: UInt64 = 64

    /// - Parameters:
    ///   - candidates: The last blocks of the table, ascending.
    ///   - blockBits: Clusters that a block counts, as a power of two.
    init(_ candidates: [Block], blockBits: UInt64) {
        var rest = candidates
        while let first = rest.first, let last = rest.last, rounds.count < Self.roundLimit {
            if first.index / Self.entriesPerSector == last.index / Self.entriesPerSector {
                add(rest, [first.index..<last.index &+ 1])
                return
            }
            let counting = Set(
                rest.lazy.filter { $0.cluster &>> blockBits != $0.index }
                    .map { $0.cluster &>> blockBits })
            let round = rest.filter { !counting.contains($0.index) }
            if round.isEmpty { return }
            add(round, Self.runs(of: round))
            rest.removeAll { indices.contains($0.index) }
        }
    }

    var isEmpty: Bool { blocks.isEmpty }

    func contains(_ index: UInt64) -> Bool { indices.contains(index) }

    private mutating func add(_ round: [Block], _ entries: [Range<UInt64>]) {
        blocks += round
        rounds.append(entries)
        indices.formUnion(round.lazy.map(\.index))
    }

    private static func runs(of round: [Block]) -> [Range<UInt64>] {
        var runs: [Range<UInt64>] = []
        for block in round {
            if let last = runs.last, last.upperBound == block.index {
                runs[runs.count - 1] = last.lowerBound..<block.index &+ 1
            } else {
                runs.append(block.index..<block.index &+ 1)
            }
        }
        return runs
    }
}
