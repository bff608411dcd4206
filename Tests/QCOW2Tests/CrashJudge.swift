import Glibc
import TestSupport

/// Tells whether a state that a power cut left keeps what was promised.
///
/// Reads with the tests' own reader only.
struct CrashJudge {
    private let layout: CrashLayout
    private(set) var model: CrashModel
    /// What is so once the change under way is there.
    private var after: CrashModel?
    private var change: CrashChange?
    /// Steps that have returned.
    private var returned: Set<Int> = [0]
    /// Per flush that is under way: the last version of each sector that it must make durable.
    private var promised: [Int: [Int: Int]] = [:]

    init(_ layout: CrashLayout, _ model: CrashModel) { (self.layout, self.model) = (layout, model) }

    /// Takes in what a client did; `durable` is what is on the disk for good.
    mutating func advance(
        _ note: CrashNote, durable: () throws(ReferenceReader.Fault) -> CrashFinding
    ) throws(ReferenceReader.Fault) {
        switch note {
        case .issued(let id, let range, let value):
            model.issue(id, range, value)
            after?.issue(id, range, value)
            if case .create(let name) = change {
                for sector in range { after?.snapshots[name]?[sector].append(value) }
            }
        case .returned(let id): returned.insert(id)
        case .flushCalled(let id): promised[id] = promises()
        case .flushReturned(let id):
            let promises = promised.removeValue(forKey: id) ?? [:]
            model.settle(promises)
            after?.settle(promises)
        case .began(let id, let change):
            returned.insert(id)
            self.change = change
            after = model.applying(change, id: id) { sector in live(sector).map(\.value) }
        case .refused: (after, change) = (nil, nil)
        case .ended: try end(try durable())
        }
    }

    private func promises() -> [Int: Int] {
        var promises: [Int: Int] = [:]
        for sector in model.sectors.indices where model.sectors[sector].count > 1 {
            promises[sector] = live(sector).first?.id
        }
        return promises
    }

    /// The version that was written last, and one that is being written.
    private func live(_ sector: Int) -> ArraySlice<CrashModel.Version> {
        let versions = model.sectors[sector]
        return versions[(versions.lastIndex { returned.contains($0.id) } ?? 0)...]
    }

    /// The change is there for good, and what was open about it is settled.
    private mutating func end(_ found: CrashFinding) throws(ReferenceReader.Fault) {
        guard let change, let after else { return }
        model = after
        (self.change, self.after) = (nil, nil)
        if let fault = model.fault(in: found, bitmapsMayBeGone: false) { throw .init(fault) }
        let exact = try CrashModel(of: found)
        switch change {
        case .create(let name): model.snapshots[name] = exact.snapshots[name]
        case .bitmap:
            for (name, bitmap) in exact.bitmaps where !bitmap.isEnabled && bitmap.isValid {
                model.bitmaps[name]?.kept = bitmap.kept
                model.bitmaps[name]?.isExact = true
            }
        case .repair, .rewrite, .close:
            guard found.leakCount <= model.leakCount else {
                throw .init("I8: \(found.leakCount) clusters leak, \(model.leakCount) did before")
            }
        case .apply, .delete, .resize: break
        }
    }

    /// Nil where the state is one that may be; otherwise what is wrong with it.
    func fault(in state: UnsafeRawBufferPointer) -> String? {
        do throws(ReferenceReader.Fault) {
            let found = try CrashFinding(in: state, layout)
            let mayBeGone =
                switch change {
                case .bitmap, .close: true
                default: false
                }
            let fault = model.fault(in: found, bitmapsMayBeGone: mayBeGone)
            guard let fault, let after else { return fault }
            let other = after.fault(in: found, bitmapsMayBeGone: mayBeGone)
            return other.map { "\(fault), and after \(change.map { "\($0)" } ?? ""): \($0)" }
        } catch { return "\(error)" }
    }
}

extension CrashJudge {
    struct Verdict {
        var stateCount = 0
        var fault: String?
        /// One of the states, drawn by the seed.
        var sample: [UInt8] = []
    }

    /// Judges the states that cuts during a recorded run could have left.
    static func judge(
        _ record: RecordingDevice, _ layout: CrashLayout, model: CrashModel, seed: UInt64,
        effort: CrashExplorer.Effort = CrashExplorer.Effort(prefixes: 10, singles: 4, subsets: 10)
    ) -> Verdict {
        var judge = CrashJudge(layout, model)
        var explorer = CrashExplorer(initial: record.initial, seed: seed, effort: effort)
        var random = RepeatableRandom(seed: seed &+ 1)
        var verdict = Verdict()
        func explore(_ explorer: inout CrashExplorer) -> String? {
            explorer.explore { state in
                verdict.stateCount += 1
                if random.chance(oneIn: UInt64(verdict.stateCount)) {
                    verdict.sample = [UInt8](state)
                }
                return judge.fault(in: state)
            }
        }
        for (index, moment) in record.moments.enumerated() {
            let isInteresting =
                switch moment {
                // Everything that this sync is to make durable may still be lost.
                case .flushed: true
                default: random.chance(oneIn: 40)
                }
            if isInteresting { verdict.fault = explore(&explorer) }
            explorer.advance(moment)
            if verdict.fault == nil, case .note(let note) = moment, let note = note as? CrashNote {
                verdict.fault = judge.take(note, &explorer)
                if case .flushReturned = note, verdict.fault == nil {
                    verdict.fault = explore(&explorer)
                }
            }
            guard verdict.fault == nil else {
                verdict.fault = "moment \(index), \(verdict.fault ?? "")"
                return verdict
            }
        }
        return verdict
    }

    private mutating func take(_ note: CrashNote, _ explorer: inout CrashExplorer) -> String? {
        do throws(ReferenceReader.Fault) {
            try advance(note) { [layout] () throws(ReferenceReader.Fault) in
                let result = explorer.withDurable { state in
                    Result { () throws(ReferenceReader.Fault) in
                        try CrashFinding(in: state, layout)
                    }
                }
                return try result.get()
            }
            return nil
        } catch { return "after \(note): \(error)" }
    }
}
