import QCOW2
import TestSupport

/// An image that is used, changed, closed and opened again; the power goes, and what a cut has left
/// is used on.
///
/// The seed decides everything: which steps are taken, which thread goes on when, which states are
/// made of the record, and which of them the next life begins with.
struct CrashSimulation {
    let layout: CrashLayout
    let seed: UInt64
    var lifeCount = 3
    /// Times that the image is opened in a life.
    var sessionCount = 2

    struct Outcome {
        var stateCount = 0
        var fault: String?
        /// The changes begun in each life.
        var changes: [String] = []
    }

    func run() -> Outcome {
        var outcome = Outcome()
        do {
            var (record, model) = try layout.record()
            for life in 0..<lifeCount {
                let seed = seed &* 1009 &+ UInt64(life)
                let failure = live(record, seed: seed)
                outcome.changes.append(changes(in: record))
                let verdict = CrashJudge.judge(record, layout, model: model, seed: seed)
                outcome.stateCount += verdict.stateCount
                if let fault = verdict.fault ?? failure {
                    outcome.fault = words(fault, outcome, life)
                    return outcome
                }
                let found = try verdict.sample.withUnsafeBytes { try CrashFinding(in: $0, layout) }
                (record, model) = (RecordingDevice(verdict.sample), try CrashModel(of: found))
            }
        } catch { outcome.fault = words("\(error)", outcome, nil) }
        return outcome
    }

    private func words(_ fault: String, _ outcome: Outcome, _ life: Int?) -> String {
        "seed \(seed) layout \(layout.testDescription) state \(outcome.stateCount)"
            + (life.map { ", life \($0)" } ?? "") + ": \(fault)"
    }

    private func changes(in record: RecordingDevice) -> String {
        record.moments.compactMap { moment in
            guard case .note(let note) = moment, let note = note as? CrashNote else { return nil }
            return switch note {
            case .began(_, let change): "\(change)"
            case .refused: "(refused)"
            default: nil
            }
        }.joined(separator: " ")
    }

    /// Uses the image on `record` until the power goes; returns what went wrong before.
    private func live(_ record: RecordingDevice, seed: UInt64) -> String? {
        do { try use(record, seed: seed) } catch { return "\(error)" }
        return nil
    }

    private func use(_ record: RecordingDevice, seed: UInt64) throws {
        let steps = CrashSteps(record)
        try takingTurns(seed: seed) {
            var random = RepeatableRandom(seed: seed)
            for session in 0..<sessionCount {
                try act(&random, steps)
                let workload = CrashWorkload(
                    layout: layout, seed: seed &* 7 &+ UInt64(session), threadCount: 2,
                    stepCount: 16, changeCount: 5)
                try workload.use(try layout.open(record), steps)
            }
        }
    }

    // MARK: On a closed image

    private func act(_ random: inout RepeatableRandom, _ steps: CrashSteps) throws {
        let device = layout.device(of: steps.record)
        switch random.number(below: 8) {
        case 0 where !layout.hasDataFile:
            try steps.change(.repair) {
                let scope: ImageRepair.Scope = random.chance(oneIn: 2) ? .all : .leaks
                _ = try ImageRepair(on: device, scope: scope, undoPath: nil)
            }
        case 1 where !layout.hasDataFile: try amend(device, &random, steps)
        case 2..<5 where layout.hasBitmaps: try changeBitmap(&random, steps)
        case 5..<8 where !layout.hasDataFile: try compact(device, &random, steps)
        default: break
        }
    }

    /// In steps of a few clusters or all at once, and mostly not to the end.
    private func compact(
        _ device: any BlockDevice, _ random: inout RepeatableRandom, _ steps: CrashSteps
    ) throws {
        try settle(device, steps)
        if try ImageCheck(device).corruptionCount > 0 {
            try steps.change(.repair) {
                _ = try ImageRepair(on: device, scope: .all, undoPath: nil)
            }
        }
        let limit = random.chance(oneIn: 3) ? Int.max : random.number(below: 20)
        let stepByteCount = UInt64(512) << UInt64(random.number(below: 10))
        try steps.change(.rewrite) {
            var calls = 0
            do {
                try Image.compact(
                    on: device, passphrases: layout.passphrases, stepByteCount: stepByteCount
                ) { _ in
                    calls += 1
                    return calls <= limit
                }
            } catch let error as ImageError where error.kind == .cancelled {}
        }
    }

    /// Opening an image that was not closed rebuilds its counts.
    private func settle(_ device: any BlockDevice, _ steps: CrashSteps) throws {
        if try Header.read(from: device).incompatibleFeatures.contains(.dirty) {
            try steps.change(.rewrite) { try layout.open(steps.record).close() }
        }
    }

    private func amend(
        _ device: any BlockDevice, _ random: inout RepeatableRandom, _ steps: CrashSteps
    ) throws {
        try settle(device, steps)
        let header = try Header.read(from: device)
        var options = AmendOptions()
        switch random.number(below: 3) {
        case 0: options.version = header.version == 3 ? .v2 : .v3
        case 1: options.hasLazyRefcounts = !header.compatibleFeatures.contains(.lazyRefcounts)
        default: options.refcountBits = 1 << UInt64(random.number(below: 7))
        }
        try steps.change(.rewrite) { try Image.amend(on: device, options: options) }
    }

    private func changeBitmap(_ random: inout RepeatableRandom, _ steps: CrashSteps) throws {
        let names = ["backup", "fine", "old", "more"]
        let name = names[random.number(below: names.count)]
        let change: BitmapChange =
            switch random.number(below: 8) {
            case 0: .remove
            case 1: .clear
            case 2: .enable
            case 3: .disable
            case 4...5: .merge(source: names[random.number(below: 4)], path: nil)
            default: .add(granularity: 512 << UInt64(random.number(below: 6)))
            }
        try steps.change(.bitmap(name, change)) {
            let image = try layout.open(steps.record)
            do throws(ImageError) {
                try image.changeBitmap(Array(name.utf8), [change])
            } catch {
                try image.close()
                throw error
            }
            try image.close()
        }
    }
}
