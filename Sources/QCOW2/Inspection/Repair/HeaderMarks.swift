/// The dirty and the corrupt bit, as a repair leaves them.
struct HeaderMarks {
    private let features: IncompatibleFeatures
    /// Version 2 has no such bits.
    private let exist: Bool
    private let scope: ImageRepair.Scope

    init(_ header: Header, _ scope: ImageRepair.Scope) {
        features = header.incompatibleFeatures
        exist = header.version >= 3
        self.scope = scope
    }

    /// Both go when nothing is wrong any more; what could not be repaired marks the image corrupt.
    /// Nil where they stay as they are.
    func edit(after check: ImageCheck) -> RepairPlan.Edit? {
        if check.corruptionCount == 0 && check.errorCount == 0 {
            edit(features.subtracting([.dirty, .corrupt]))
        } else if scope == .all {
            edit(features.union(.corrupt))
        } else {
            nil
        }
    }

    /// Whatever a check finds.
    var possibleEdits: [RepairPlan.Edit] {
        [edit(features.subtracting([.dirty, .corrupt])), edit(features.union(.corrupt))]
            .compactMap { $0 }
    }

    private func edit(_ new: IncompatibleFeatures) -> RepairPlan.Edit? {
        guard exist, new != features else { return nil }
        var bits = [UInt8](repeating: 0, count: 8)
        bits.storeBigEndian(new.rawValue, at: 0)
        return RepairPlan.Edit(
            offset: UInt64(HeaderField.incompatibleFeatures), bytes: bits)
    }
}
