/// One step of a compaction: copies, counts the copies, switches the references, and gives up what
/// they led to, each on the disk before the next begins.
///
/// After a power cut in between some references lead to the old places and some to the new ones,
/// which hold the same bytes and are both counted.
struct CompactionPass {
    private let file: HostFile
    private let survey: CompactionSurvey
    private let plan: CompactionPlan
    private let key: CompactionKey?
    private var edits: RefcountEdits
    /// What was copied.
    private var moves: [CompactionPlan.Move] = []
    private var streams: [StreamMove] = []

    private(set) var movedClusterCount: UInt64 = 0
    private(set) var freedTableCount: UInt64 = 0

    init(
        _ file: HostFile, _ survey: CompactionSurvey, _ plan: CompactionPlan,
        _ key: CompactionKey?
    ) {
        self.file = file
        self.survey = survey
        self.plan = plan
        self.key = key
        edits = RefcountEdits(survey.stored, file, clusterBits: survey.clusterBits)
    }

    /// Moves about `limit` bytes; returns whether there was anything to do.
    mutating func run(
        limit: UInt64, _ meter: inout CompactionMeter
    ) throws(ImageError) -> Bool {
        try prepare()
        try copy(limit: limit, &meter)
        let relocation = Relocation(
            moves, streams, emptyTables: survey.emptyTables, clusterBits: survey.clusterBits)
        let rest = CompactionRest(survey, plan, relocation, streams)
        let isShorter = file.readsZerosPastEnd && rest.byteCount < file.writtenEnd
        if relocation.isEmpty, rest.idleBlocks.isEmpty, !isShorter { return false }
        let tables = TableSwitch(file, survey, relocation)
        if !relocation.isEmpty {
            try tables.writeMoved()
            try countCopies(relocation)
            try file.flush()
            try tables.switchOthers()
            try file.flush()
        }
        try giveUp(relocation, rest, tables)
        if isShorter { try file.resize(to: rest.byteCount) }
        try file.flush()
        punchHoles(below: rest.end)
        movedClusterCount = rest.movedClusterCount
        freedTableCount = UInt64(survey.emptyTables.count &+ rest.idleBlocks.blocks.count)
        return true
    }

    /// Autoclear bits of features that nobody here keeps up with go before anything else changes.
    private func prepare() throws(ImageError) {
        let header = survey.header
        let known = header.autoclearFeatures.intersection(.known)
        guard header.version == 3, known != header.autoclearFeatures, !plan.isEmpty else { return }
        try HeaderSector(of: file).changeNow {
            $0.storeBigEndian(known.rawValue, at: HeaderField.autoclearFeatures)
        }
    }

    // MARK: Copies

    /// The highest clusters go first, so that the file ends earlier whenever this ends.
    private mutating func copy(
        limit: UInt64, _ meter: inout CompactionMeter
    ) throws(ImageError) {
        let copier = ClusterCopier(file, survey, key)
        let items = copier.items(of: plan).map { ($0, copier.extent(of: $0)) }
        var copied: UInt64 = 0
        for (item, extent) in items.sorted(by: { $0.1.source > $1.1.source }) {
            if copied >= limit || meter.isCancelled { break }
            do throws(ImageError) {
                try copier.copy(item)
            } catch {
                // Giving up what was moved so far makes room for the rest.
                guard error.isNoSpace, copied > 0 else { throw error }
                break
            }
            switch item {
            case .clusters(let move): moves.append(move)
            case .streams(let part): streams += part
            }
            copied &+= extent.byteCount
            meter.add(extent.byteCount)
        }
    }

    // MARK: Counts

    private mutating func countCopies(_ relocation: Relocation) throws(ImageError) {
        for move in moves {
            for number in 0..<move.count {
                let count = survey.counts.count(of: move.source &+ number)
                try edits.set(move.target &+ number, count)
            }
        }
        var counts: [UInt64: UInt64] = [:]
        for stream in streams {
            for cluster in stream.targetClusters(clusterBits: survey.clusterBits) {
                counts[cluster, default: 0] &+= stream.stream.count
            }
        }
        for (cluster, count) in counts { try edits.set(cluster, count) }
        // Until the table is switched either of two blocks may be the one that counts.
        try edits.write { cluster in
            let place = relocation.place(of: cluster)
            return place == cluster ? [cluster] : [cluster, place]
        }
    }

    /// Lowers the counts of what nothing leads to any more.
    private mutating func giveUp(
        _ relocation: Relocation, _ rest: CompactionRest, _ tables: TableSwitch
    ) throws(ImageError) {
        for move in moves {
            for cluster in move.source..<move.source &+ move.count {
                try lower(cluster, to: 0, rest)
            }
        }
        for (cluster, count) in rest.streamCounts { try lower(cluster, to: count, rest) }
        for table in survey.emptyTables {
            try lower(table &>> survey.clusterBits, to: 0, rest)
        }
        try edits.write { [relocation.place(of: $0)] }
        for entries in rest.idleBlocks.rounds {
            for run in entries { try tables.clearBlocks(run) }
            try file.flush()
        }
        guard !rest.idleBlocks.isEmpty else { return try file.flush() }
        for block in rest.idleBlocks.blocks { try lower(block.cluster, to: 0, rest) }
        try edits.write { [relocation.place(of: $0)] }
    }

    /// What an idle block counts is given up with it.
    private mutating func lower(
        _ cluster: UInt64, to count: UInt64, _ rest: CompactionRest
    ) throws(ImageError) {
        if rest.idleBlocks.contains(survey.stored.blockIndex(of: cluster)) { return }
        try edits.set(cluster, count)
    }

    /// Free clusters that the file still has keep no space.
    private func punchHoles(below end: UInt64) {
        for move in moves where move.source < end {
            let last = min(move.source &+ move.count, end)
            file.punchHole(move.source &<< survey.clusterBits..<last &<< survey.clusterBits)
        }
    }
}

extension StreamMove {
    func targetClusters(clusterBits: UInt64) -> ClosedRange<UInt64> {
        target &>> clusterBits...(target &+ stream.byteCount &- 1) &>> clusterBits
    }
}
