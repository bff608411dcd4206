import Glibc
import TestSupport

/// Tells whether a state that a power cut left keeps what was promised.
///
/// Reads with the tests' own reader only.
struct CrashJudge {
    private struct Version {
        let id: Int
        let value: UInt64
    }

    private let layout: CrashLayout
    /// What the snapshot holds.
    private let kept: [UInt64]
    /// Per sector, ascending: the value at the last acknowledged flush, and those issued since.
    private var versions: [[Version]]
    private var returned: Set<Int> = []
    /// Per flush that is under way: the last version of each sector that it must make durable.
    private var promised: [Int: [Int: Int]] = [:]
    private let buffer: UnsafeMutableRawBufferPointer

    init(_ layout: CrashLayout, initial: [UInt64]) {
        self.layout = layout
        kept = initial
        versions = initial.map { [Version(id: 0, value: $0)] }
        buffer = .allocate(byteCount: layout.byteCount, alignment: 4096)
    }

    func end() { buffer.deallocate() }

    /// Takes in what a client did.
    mutating func advance(_ note: RecordingDevice.Note) {
        switch note {
        case .issued(let id, let sectors, let value):
            for sector in sectors { versions[sector].append(Version(id: id, value: value)) }
        case .returned(let id): returned.insert(id)
        case .flushCalled(let id): promised[id] = promises()
        case .flushReturned(let id):
            for (sector, version) in promised.removeValue(forKey: id) ?? [:] {
                versions[sector].removeAll { $0.id < version }
            }
        }
    }

    private func promises() -> [Int: Int] {
        var promises: [Int: Int] = [:]
        for (sector, list) in versions.enumerated() where list.count > 1 {
            promises[sector] = list.last { $0.id == 0 || returned.contains($0.id) }?.id
        }
        return promises
    }

    /// Nil where the state is one that may be; otherwise what is wrong with it.
    func fault(in state: UnsafeRawBufferPointer, isClosed: Bool = false) -> String? {
        do throws(ReferenceReader.Fault) {
            let files = layout.files(of: state)
            let reader = try ReferenceReader(files.image, dataFile: files.data)
            let audit = reader.audit()
            if let fault = audit.faults.first { return fault }
            if isClosed && audit.leakCount > 0 {
                return "I8: \(audit.leakCount) clusters leak after a clean close"
            }
            if let fault = try activeFault(reader) { return fault }
            if layout.isRaw, let data = files.data {
                buffer.copyMemory(from: data)
                if let fault = sectorFault("of the raw data file ") { return fault }
            }
            return try snapshotFault(reader)
        } catch { return "I3: \(error)" }
    }

    private func activeFault(
        _ reader: ReferenceReader
    ) throws(ReferenceReader.Fault) -> String? {
        try read(reader, through: reader.active)
        return sectorFault()
    }

    /// The first sector in the buffer that holds none of what it may.
    private func sectorFault(_ place: String = "") -> String? {
        for sector in 0..<layout.sectorCount {
            let value = value(of: sector)
            if versions[sector].contains(where: { $0.value == value }) { continue }
            return "I4: sector \(sector) \(place)holds "
                + (value.map(String.init) ?? "foreign or torn bytes")
                + ", which is none of \(versions[sector].map(\.value))"
        }
        return nil
    }

    private func snapshotFault(
        _ reader: ReferenceReader
    ) throws(ReferenceReader.Fault) -> String? {
        guard layout.hasSnapshot else { return nil }
        guard let snapshot = try reader.snapshots().entries.first else {
            return "I6: the snapshot is gone"
        }
        try read(reader, through: snapshot.table)
        for sector in 0..<layout.sectorCount where value(of: sector) != kept[sector] {
            return "I6: sector \(sector) of the snapshot has changed"
        }
        return nil
    }

    private func read(
        _ reader: ReferenceReader, through table: ReferenceReader.L1Table
    ) throws(ReferenceReader.Fault) {
        guard layout.hasBacking else { return try reader.read(into: buffer, at: 0, through: table) }
        try reader.read(into: buffer, at: 0, through: table) { offset, part in
            for position in stride(from: 0, to: part.count, by: 512) {
                SectorPattern.fill(
                    UnsafeMutableRawBufferPointer(rebasing: part[position..<position + 512]),
                    sector: (offset + position) / 512, value: CrashLayout.backed)
            }
        }
    }

    private func value(of sector: Int) -> UInt64? {
        SectorPattern.value(
            of: UnsafeRawBufferPointer(rebasing: buffer[sector * 512..<(sector + 1) * 512]),
            sector: sector)
    }
}

extension CrashJudge {
    /// Judges the states that cuts during a recorded run could have left.
    ///
    /// Returns how many were judged, and the first fault.
    static func judge(
        _ record: RecordingDevice, _ layout: CrashLayout, initial: [UInt64], seed: UInt64,
        effort: CrashExplorer.Effort = CrashExplorer.Effort()
    ) -> (stateCount: Int, fault: String?) {
        var judge = CrashJudge(layout, initial: initial)
        defer { judge.end() }
        var explorer = CrashExplorer(initial: record.initial, seed: seed, effort: effort)
        var random = RepeatableRandom(seed: seed)
        for (index, moment) in record.moments.enumerated() {
            let isInteresting =
                switch moment {
                // Everything that this sync is to make durable may still be lost.
                case .flushed: true
                default: random.chance(oneIn: 40)
                }
            if isInteresting, let fault = explorer.explore({ judge.fault(in: $0) }) {
                return (explorer.stateCount, "moment \(index): \(fault)")
            }
            explorer.advance(moment)
            guard case .note(let note) = moment else { continue }
            judge.advance(note)
            if case .flushReturned = note, let fault = explorer.explore({ judge.fault(in: $0) }) {
                return (explorer.stateCount, "moment \(index), after a flush: \(fault)")
            }
        }
        let fault = record.bytes.withUnsafeBytes { judge.fault(in: $0, isClosed: true) }
        return (explorer.stateCount + 1, fault.map { "after a clean close: \($0)" })
    }
}
