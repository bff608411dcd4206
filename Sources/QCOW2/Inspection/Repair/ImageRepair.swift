/// Makes an image's tables and reference counts agree again.
public struct ImageRepair: Sendable {
    /// How much is repaired.
    public enum Scope: Sendable {
        /// Only what wastes space: counts that are too high.
        case leaks
        /// Everything that can be repaired without changing what the guest reads.
        case all
    }

    /// What a second check found after the repair.
    public let check: ImageCheck
    /// Findings that meant damage, and are gone.
    public let fixedCorruptionCount: UInt64
    /// Clusters that nothing used, and that are free again.
    public let fixedLeakCount: UInt64
    /// Where the replaced metadata was saved; nil where nothing had to be changed.
    public let undoPath: String?

    /// Repairs the image at `path`, which nobody else may have open.
    ///
    /// - Parameters:
    ///   - path: Where the image is.
    ///   - scope: How much is repaired.
    ///   - progress: Told what part is done, from 0 to 1, as the first check goes on; false
    ///     cancels, and nothing is changed.
    ///   - report: Gets each finding of the first check.
    ///   - announce: Gets what is going to be done, a line each, before anything is written.
    /// - Throws: what a check throws, `.cancelled` too; `.locked`; `.system` where the image or the
    ///   file with the replaced metadata cannot be written.
    public init(
        path: String, scope: Scope, report: @escaping (CheckFinding) -> Void = { _ in },
        announce: (String) -> Void = { _ in }, progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        let device = try Self.open(path)
        defer { device.close() }
        try self.init(
            on: device, scope: scope, undoPath: UndoFile.freePath(for: path), report: report,
            announce: announce, progress: progress)
    }

    /// Repairs the image on a device, of which everything that can be read is durable.
    ///
    /// - Parameter undoPath: Where the replaced metadata is saved; nil for nowhere.
    package init(
        on device: any BlockDevice, scope: Scope, undoPath: String?,
        report: @escaping (CheckFinding) -> Void = { _ in }, announce: (String) -> Void = { _ in },
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        let before = try Examination(device, report: report, progress: progress)
        let plan = try RepairPlanner(device, before, scope).plan()
        let marks = HeaderMarks(before.header, scope)
        let isSound = plan.isEmpty && marks.edit(after: before.result) == nil
        self.undoPath = isSound ? nil : undoPath
        for line in plan.lines { announce(line) }
        if plan.isEmpty, !isSound { announce("set the dirty and corrupt bits right") }
        if !isSound, let undoPath {
            // What a second check will find is not known yet.
            let edits = Array(plan.stages.joined()) + marks.possibleEdits
            try UndoFile.write(edits, of: device, to: undoPath)
        }
        try plan.execute(on: device)
        let after = plan.isEmpty ? before.result : try Examination(device).result
        check = after
        fixedCorruptionCount = before.result.corruptionCount.saturatingDifference(
            after.corruptionCount)
        fixedLeakCount = before.result.leakCount.saturatingDifference(after.leakCount)
        if let edit = marks.edit(after: after) { try RepairPlan(edit).execute(on: device) }
    }

    /// Puts back the metadata that a repair has replaced and saved at `undoPath`.
    /// - Throws: `.invalidArgument` where the image was changed since.
    public static func undo(path: String, undoPath: String) throws(ImageError) {
        let device = try open(path)
        defer { device.close() }
        try UndoFile.restore(undoPath, to: device)
    }

    /// What a killed predecessor left in the page cache becomes durable before it is believed.
    private static func open(_ path: String) throws(ImageError) -> FileDevice {
        let device = try FileDevice(path: path, access: .readWrite, mapsBytes: false)
        do throws(ImageError) {
            try ImageLock.take(.writer, on: device)
            do throws(SystemError) {
                try device.flush()
            } catch {
                throw ImageError(.system(error, operation: "cannot sync"), file: path)
            }
            return device
        } catch {
            device.close()
            throw error
        }
    }
}

extension UInt64 {
    fileprivate func saturatingDifference(_ other: UInt64) -> UInt64 {
        self > other ? self - other : 0
    }
}
