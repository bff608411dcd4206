import QCOW2
import TestSupport

/// What a client of the engine notes in the record of its device.
enum CrashNote: Sendable {
    /// The sectors get the value of step `id`; 0 stands for zeros.
    case issued(id: Int, sectors: Range<Int>, value: UInt64)
    case returned(id: Int)
    case flushCalled(id: Int)
    case flushReturned(id: Int)
    /// A change of the structure, which is there wholly or not at all until it ends.
    case began(id: Int, CrashChange)
    case ended(id: Int)
    /// It was refused, and changed nothing.
    case refused(id: Int)
}

extension RecordingDevice {
    func note(_ note: CrashNote) { self.note(note as any Sendable) }
}

/// A change of what an image is, besides what its disk holds.
enum CrashChange: Sendable {
    case create(String)
    case apply(String)
    case delete(String)
    case resize(sectorCount: Int)
    /// To a bitmap of an image that nobody writes to.
    case bitmap(String, BitmapChange)
    case close
    /// The tables, the counts or the header are written anew: an amendment.
    case rewrite
    /// A repair, after which nothing is wasted.
    case repair
}

/// What a disk, its snapshots and its bitmaps may hold.
struct CrashModel: Sendable {
    /// What a step made of a sector.
    struct Version {
        let id: Int
        let value: UInt64
    }

    struct Bitmap {
        var granularity: Int
        var isEnabled: Bool
        /// Whether anybody may believe it.
        var isValid: Bool
        /// Granules that are marked whatever the disk holds, and whether they are all.
        var kept: Set<Int>
        var isExact = true
        /// What the disk held when no others had to be marked.
        var base: [UInt64]
    }

    /// Per sector, ascending: the value at the last acknowledged flush, and those issued since.
    var sectors: [[Version]]
    /// Per snapshot and sector, the values that may be kept.
    var snapshots: [String: [[UInt64]]] = [:]
    var bitmaps: [String: Bitmap] = [:]
    /// Clusters that may be wasted after a clean close.
    var leakCount = 0

    /// What an image holds that nobody writes to.
    init(of found: CrashFinding) throws(ReferenceReader.Fault) {
        let values = try Self.known(found.disk)
        sectors = values.map { [Version(id: 0, value: $0)] }
        for (name, values) in found.snapshots {
            snapshots[name] = try Self.known(values).map { [$0] }
        }
        for bitmap in found.bitmaps {
            bitmaps[bitmap.name] = Bitmap(
                granularity: bitmap.granularity, isEnabled: bitmap.flags & 2 != 0,
                isValid: !bitmap.isInUse, kept: Set(bitmap.marked), base: values)
        }
        leakCount = found.leakCount
    }

    private static func known(_ values: [UInt64?]) throws(ReferenceReader.Fault) -> [UInt64] {
        let known = values.compactMap { $0 }
        guard known.count == values.count else { throw .init("foreign or torn bytes") }
        return known
    }

    /// The last value of each sector.
    var values: [UInt64] { sectors.map { $0.last?.value ?? 0 } }

    // MARK: What happens

    mutating func issue(_ id: Int, _ range: Range<Int>, _ value: UInt64) {
        for sector in range where sector < sectors.count {
            sectors[sector].append(Version(id: id, value: value))
        }
    }

    /// Where the last version is durable that `returned` has, the ones before it are gone.
    mutating func settle(_ promised: [Int: Int]) {
        for (sector, id) in promised where sector < sectors.count {
            sectors[sector].removeAll { $0.id < id }
        }
    }

    /// The model after a change, which is step `id`; `live` tells what a sector may hold for a
    /// reader now.
    func applying(_ change: CrashChange, id: Int, live: (Int) -> [UInt64]) -> CrashModel {
        var after = self
        switch change {
        case .create(let name): after.snapshots[name] = sectors.indices.map(live)
        case .delete(let name): after.snapshots[name] = nil
        case .apply(let name):
            after.sectors = (snapshots[name] ?? []).map { [Version(id: id, value: $0[0])] }
            after.resizeBitmaps()
        case .resize(let count):
            after.sectors = Array(sectors.prefix(count))
            after.sectors += (after.sectors.count..<count).map { _ in [Version(id: id, value: 0)] }
            after.resizeBitmaps()
        case .bitmap(let name, let change): after.changeBitmap(name, change)
        case .repair: after.leakCount = 0
        case .close, .rewrite: break
        }
        return after
    }

    /// A base of another length than the disk: what is new reads as zeros and was not there.
    private mutating func resizeBitmaps() {
        for name in bitmaps.keys {
            let granularity = bitmaps[name]!.granularity
            let count = sectors.count
            bitmaps[name]!.base = Array(bitmaps[name]!.base.prefix(count))
            let missing = count - bitmaps[name]!.base.count
            bitmaps[name]!.base += [UInt64](repeating: 0, count: missing)
            bitmaps[name]!.kept = bitmaps[name]!.kept.filter { $0 * granularity < count * 512 }
        }
    }

    private mutating func changeBitmap(_ name: String, _ change: BitmapChange) {
        switch change {
        case .add(let granularity):
            bitmaps[name] = Bitmap(
                granularity: Int(granularity ?? 4096), isEnabled: true, isValid: true, kept: [],
                base: values)
        case .remove: bitmaps[name] = nil
        case .clear:
            let values = self.values
            bitmaps[name]?.kept = []
            bitmaps[name]?.base = values
            bitmaps[name]?.isExact = true
        case .enable:
            guard bitmaps[name]?.isEnabled == false else { return }
            let values = self.values
            bitmaps[name]?.isEnabled = true
            bitmaps[name]?.base = values
        case .disable:
            guard let bitmap = bitmaps[name], bitmap.isEnabled else { return }
            let required = self.required(bitmap)
            bitmaps[name]?.kept = required
            bitmaps[name]?.isExact = false
            bitmaps[name]?.isEnabled = false
        case .merge(let source, _):
            guard let bitmap = bitmaps[name], let other = bitmaps[source] else { return }
            let granules = required(other).flatMap { granule in
                let start = granule * other.granularity
                let end = min(start + other.granularity, sectors.count * 512)
                return start / bitmap.granularity...(end - 1) / bitmap.granularity
            }
            bitmaps[name]?.kept.formUnion(granules)
            bitmaps[name]?.isExact = false
        }
    }

    /// The granules that a bitmap has to mark while the disk holds `values`.
    private func required(_ bitmap: Bitmap, _ values: [UInt64?]? = nil) -> Set<Int> {
        guard bitmap.isEnabled else { return bitmap.kept }
        let values = values ?? self.values
        var required = bitmap.kept
        for sector in bitmap.base.indices where values[sector] != bitmap.base[sector] {
            required.insert(sector * 512 / bitmap.granularity)
        }
        return required
    }

    // MARK: Comparing

    /// What of an image is none of what may be; nil where all of it may be.
    func fault(in found: CrashFinding, bitmapsMayBeGone: Bool) -> String? {
        guard found.disk.count == sectors.count else {
            return "the disk has \(found.disk.count) sectors, not \(sectors.count)"
        }
        if let fault = diskFault(found.disk, "") { return fault }
        if let raw = found.rawData, let fault = diskFault(raw, " of the raw data file") {
            return fault
        }
        return snapshotFault(found) ?? bitmapFault(found, mayBeGone: bitmapsMayBeGone)
    }

    private func diskFault(_ values: [UInt64?], _ place: String) -> String? {
        for (sector, value) in values.enumerated()
        where !sectors[sector].contains(where: { $0.value == value }) {
            return "I4: sector \(sector)\(place) holds " + Self.words(value)
                + ", which is none of \(sectors[sector].map(\.value))"
        }
        return nil
    }

    static func words(_ value: UInt64?) -> String {
        value.map(String.init) ?? "foreign or torn bytes"
    }

    private func snapshotFault(_ found: CrashFinding) -> String? {
        guard Set(found.snapshots.keys) == Set(snapshots.keys) else {
            return "I6: there are the snapshots \(found.snapshots.keys.sorted()), not "
                + "\(snapshots.keys.sorted())"
        }
        for (name, values) in found.snapshots {
            let kept = snapshots[name] ?? []
            guard values.count == kept.count else { return "I6: \(name) has another size" }
            for sector in values.indices
            where !kept[sector].contains(where: { $0 == values[sector] }) {
                return "I6: sector \(sector) of \(name) holds " + Self.words(values[sector])
                    + ", which is none of \(kept[sector])"
            }
        }
        return nil
    }

    private func bitmapFault(_ found: CrashFinding, mayBeGone: Bool) -> String? {
        if found.bitmaps.isEmpty, mayBeGone { return nil }
        guard Set(found.bitmaps.map(\.name)) == Set(bitmaps.keys) else {
            return
                "there are the bitmaps \(found.bitmaps.map(\.name)), not \(bitmaps.keys.sorted())"
        }
        for bitmap in found.bitmaps where !bitmap.isInUse {
            guard let model = bitmaps[bitmap.name] else { continue }
            guard model.isValid else { return "'\(bitmap.name)' was in use and is valid now" }
            guard (bitmap.flags & 2 != 0) == model.isEnabled else {
                return "'\(bitmap.name)' is \(model.isEnabled ? "disabled" : "enabled")"
            }
            let missing = required(model, found.disk).subtracting(bitmap.marked)
            if let granule = missing.min() {
                return "'\(bitmap.name)' is valid and misses granule \(granule)"
            }
            if !model.isEnabled, model.isExact, Set(bitmap.marked) != model.kept {
                return "'\(bitmap.name)' is disabled and has changed"
            }
        }
        return nil
    }
}
