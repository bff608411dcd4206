import QCOW2
import TestSupport
import Testing

/// Whatever moment the power goes while snapshots are made, applied and deleted, or the disk
/// changes its size: the disk and every snapshot are whole, as they were before or after.
@Suite("Snapshot and resize crash", .serialized)
struct SnapshotCrashTests {
    struct Layout: Sendable, CustomTestStringConvertible {
        var clusterBits: Int
        var refcountOrder = 4
        var version: UInt32 = 3
        var hasBacking = false
        var guestClusters: Int

        var testDescription: String {
            "v\(version), \(1 << clusterBits) B, \(1 << refcountOrder)-bit counts"
                + (hasBacking ? ", backing" : "")
        }

        var crash: CrashLayout {
            CrashLayout(
                version: version, clusterBits: clusterBits, refcountOrder: refcountOrder,
                guestClusters: guestClusters, hasSnapshot: false, hasBacking: hasBacking,
                hasCompressed: true)
        }
    }

    @Test(
        "Trap 55: create, apply and delete, three times each, leave no wrong state",
        arguments: [
            Layout(clusterBits: 9, guestClusters: 160),
            Layout(clusterBits: 9, version: 2, guestClusters: 160),
            Layout(clusterBits: 12, refcountOrder: 5, hasBacking: true, guestClusters: 40),
            Layout(clusterBits: 16, refcountOrder: 6, guestClusters: 16),
        ])
    func snapshots(_ layout: Layout) throws {
        var script = CrashScript(layout.crash)
        for round in 1...3 {
            script.write(round * 7..<round * 7 + 12, value: UInt64(round) + 100)
            script.create("s\(round)")
        }
        for round in [2, 1, 3] {
            script.write(round * 5..<round * 5 + 20, value: UInt64(round) + 200)
            script.apply("s\(round)")
        }
        script.write(0..<9, value: 300)
        for round in [2, 3, 1] {
            script.delete("s\(round)")
            script.write(round * 11..<round * 11 + 9, value: UInt64(round) + 400)
        }
        try judge(script, layout)
    }

    @Test(
        "Trap 62: growing, with a larger L1 table, and shrinking leave no wrong state",
        arguments: [
            Layout(clusterBits: 9, guestClusters: 160),
            Layout(clusterBits: 9, hasBacking: true, guestClusters: 160),
            Layout(clusterBits: 12, refcountOrder: 3, guestClusters: 40),
        ])
    func resizes(_ layout: Layout) throws {
        var script = CrashScript(layout.crash)
        let size = layout.crash.byteCount
        script.create("kept")
        script.write(3..<30, value: 100)
        // 512-byte clusters: 64 tables fill a cluster of the L1 table at 2 MiB.
        script.resize(to: layout.clusterBits == 9 ? 2.MiB + 128.KiB : size * 2)
        script.write(size / 512 - 5..<size / 512 + 40, value: 101)
        script.resize(to: size / 2 + 512)
        script.resize(to: size)
        script.write(0..<4, value: 102)
        script.resize(to: 512)
        script.resize(to: size / 2)
        script.apply("kept")
        try judge(script, layout)
    }

    private func judge(_ script: CrashScript, _ layout: Layout) throws {
        let seed = TestEnvironment.seed
        let (record, final) = try script.run(seed: seed)
        let (count, fault) = script.judge(record, seed: seed)
        if let fault { Issue.record("\(layout.testDescription), seed \(seed): \(fault)") }
        #expect(final == nil, "after a clean close: \(final ?? "")")
        print("• \(count) crash states judged: \(layout.testDescription)")
        #expect(count > 500)
    }
}

/// What a client does to an image, step by step, with what the disk and its snapshots hold after
/// each step.
struct CrashScript {
    private struct State {
        var values: [UInt64]
        var snapshots: [String: [UInt64]] = [:]
    }

    private struct Step {
        let name: String
        /// Whether the disk is wholly the old or the new one meanwhile; sector by sector if not.
        let isAtomic: Bool
        let body: @Sendable (Image) throws -> Void
        let after: State
    }

    private let layout: CrashLayout
    private let image: [UInt8]
    private let initial: State
    private var steps: [Step] = []
    private var state: State { steps.last?.after ?? initial }

    init(_ layout: CrashLayout) {
        self.layout = layout
        let (image, values) = layout.build()
        self.image = image
        initial = State(values: values)
    }

    // MARK: Writing the script

    private mutating func add(
        _ name: String, isAtomic: Bool = true, _ change: (inout State) -> Void,
        body: @escaping @Sendable (Image) throws -> Void
    ) {
        var after = state
        change(&after)
        steps.append(Step(name: name, isAtomic: isAtomic, body: body, after: after))
    }

    mutating func write(_ sectors: Range<Int>, value: UInt64) {
        add("write \(sectors)", isAtomic: false) {
            for sector in sectors { $0.values[sector] = value }
        } body: { image in
            try image.write(
                SectorPattern.bytes(sectors: sectors, value: value), at: sectors.lowerBound * 512)
            try image.flush()
        }
    }

    mutating func create(_ name: String) {
        add("create \(name)") {
            $0.snapshots[name] = $0.values
        } body: {
            try $0.createSnapshot(name)
        }
    }

    mutating func apply(_ name: String) {
        add("apply \(name)") {
            $0.values = $0.snapshots[name] ?? []
        } body: {
            try $0.applySnapshot(name)
        }
    }

    mutating func delete(_ name: String) {
        add("delete \(name)") {
            $0.snapshots[name] = nil
        } body: {
            try $0.deleteSnapshot(name)
        }
    }

    mutating func resize(to byteCount: Int) {
        add("resize to \(byteCount)") { state in
            let count = byteCount / 512
            let more = max(count - state.values.count, 0)
            state.values = Array(state.values.prefix(count)) + Array(repeating: 0, count: more)
        } body: { image in
            try image.resize(to: UInt64(byteCount), shrinking: true)
        }
    }

    // MARK: Running it

    /// Runs the steps and closes the image; returns the record, and what is wrong afterwards.
    func run(seed: UInt64) throws -> (record: RecordingDevice, fault: String?) {
        let record = RecordingDevice(image, seed: seed, yielding: false)
        let image = try Image.open(record, backing: layout.backing())
        for (number, step) in steps.enumerated() {
            record.note(.flushCalled(id: number))
            try step.body(image)
            record.note(.flushReturned(id: number))
        }
        try image.close()
        let fault = record.withBytes { self.fault(in: $0, [state], isAtomic: true, isClosed: true) }
        return (record, fault)
    }

    /// Judges the states that cuts during a recorded run could have left.
    func judge(_ record: RecordingDevice, seed: UInt64) -> (stateCount: Int, fault: String?) {
        var explorer = CrashExplorer(
            initial: record.initial, seed: seed,
            effort: .init(prefixes: 10, singles: 4, subsets: 10))
        var random = RepeatableRandom(seed: seed)
        var running: Int?
        var done = -1
        for (index, moment) in record.moments.enumerated() {
            let isInteresting = if case .flushed = moment { true } else { random.chance(oneIn: 30) }
            if isInteresting {
                let allowed = [after(done)] + (running.map { [after($0)] } ?? [])
                let isAtomic = running.map { steps[$0].isAtomic } ?? true
                let fault = explorer.explore { self.fault(in: $0, allowed, isAtomic: isAtomic) }
                if let fault {
                    let step = running.map { steps[$0].name } ?? "between steps"
                    return (explorer.stateCount, "moment \(index), \(step): \(fault)")
                }
            }
            explorer.advance(moment)
            switch moment {
            case .note(.flushCalled(let id)): running = id
            case .note(.flushReturned(let id)): (running, done) = (nil, id)
            default: break
            }
        }
        return (explorer.stateCount, nil)
    }

    private func after(_ step: Int) -> State { step < 0 ? initial : steps[step].after }

    // MARK: Judging a state

    private func fault(
        in bytes: UnsafeRawBufferPointer, _ allowed: [State], isAtomic: Bool,
        isClosed: Bool = false
    ) -> String? {
        do throws(ReferenceReader.Fault) {
            let reader = try ReferenceReader(bytes)
            let audit = reader.audit()
            if let fault = audit.faults.first { return fault }
            if isClosed, audit.leakCount > 0 { return "\(audit.leakCount) clusters leak" }
            let entries = try reader.snapshots().entries
            let names = Set(entries.map(\.name))
            guard allowed.contains(where: { Set($0.snapshots.keys) == names }) else {
                return "there are the snapshots \(names.sorted())"
            }
            for entry in entries {
                let kept = allowed.compactMap { $0.snapshots[entry.name] }[0]
                let found = try values(reader, entry.table, count: kept.count)
                guard found == kept, entry.byteCount == nil || entry.byteCount == kept.count * 512
                else { return "I6: snapshot \(entry.name) has changed" }
            }
            let found = try values(reader, reader.active, count: reader.byteCount / 512)
            if allowed.contains(where: { $0.values.map(Optional.some) == found }) { return nil }
            let isMixed =
                !isAtomic
                && found.indices.allSatisfy { sector in
                    allowed.contains {
                        $0.values.count == found.count && $0.values[sector] == found[sector]
                    }
                }
            return isMixed ? nil : "I4: the disk of \(found.count) sectors is neither old nor new"
        } catch { return "I3: \(error)" }
    }

    /// What sectors hold; nil for foreign or torn bytes.
    private func values(
        _ reader: ReferenceReader, _ table: ReferenceReader.L1Table, count: Int
    ) throws(ReferenceReader.Fault) -> [UInt64?] {
        let size = layout.byteCount
        var backing: ReferenceReader.Backing?
        if layout.hasBacking {
            backing = { (offset, part) throws(ReferenceReader.Fault) in
                for position in stride(from: 0, to: part.count, by: 512) {
                    SectorPattern.fill(
                        UnsafeMutableRawBufferPointer(rebasing: part[position..<position + 512]),
                        sector: (offset + position) / 512,
                        value: offset + position < size ? CrashLayout.backed : 0)
                }
            }
        }
        let bytes = try reader.read(0..<count * 512, through: table, backing: backing)
        return (0..<count).map { sector in
            bytes[sector * 512..<(sector + 1) * 512].withUnsafeBytes {
                SectorPattern.value(of: $0, sector: sector)
            }
        }
    }
}
