import Glibc
import TestSupport

/// A change that random runs make of an image's structure.
enum StructureChange: Sendable {
    case create(String)
    case apply(String)
    case delete(String)
    case resize(Int, Growth = .size)

    /// How a disk gets larger.
    enum Growth: String, CaseIterable {
        /// By its size, and in what follows with clusters for the new bytes.
        case size = "off"
        case metadata, falloc, full
    }

    /// Bytes of the disk afterwards, where they may be others than before.
    var newSize: Int? { if case .resize(let byteCount, _) = self { byteCount } else { nil } }

    var replacesDisk: Bool { if case .apply = self { true } else { false } }

    /// What qemu-img and the program call it; the path of the image is missing.
    var words: [String] {
        switch self {
        case .create(let name): ["snapshot", "-c", name]
        case .apply(let name): ["snapshot", "-a", name]
        case .delete(let name): ["snapshot", "-d", name]
        case .resize(let byteCount, .size): ["resize", "--shrink", "\(byteCount)"]
        case .resize(let byteCount, let growth):
            ["resize", "--preallocation", growth.rawValue, "\(byteCount)"]
        }
    }
}

/// Snapshots and other sizes, in between and beside.
extension RandomRun {
    /// Threads use the disk while, half of the times, its structure changes.
    func useAndChange(_ mount: TestMount, part: Int) throws {
        let steps = TestEnvironment.isLong ? 100 : 20
        guard random.chance(oneIn: 2), let change = nextChangeBesideThreads() else {
            history.append("use")
            return try use(mount, part: part, steps: steps)
        }
        history.append("use beside \(change)")
        let make = make(change, mount)
        let reader = snapshotReader(beside: change, mount)
        let delay = UInt32(random.number(below: 6000))
        try use(mount, part: part, steps: steps, beside: change) {
            usleep(delay)
            try onThreads(2) { index in try index == 0 ? make() : reader() }
        }
        switch change {
        case .create(let name):
            // What it holds nobody can tell but itself; from here on it must not change.
            snapshots[name] = try disk(at: snapshotFile(name, of: mount), model.byteCount)
        case .apply:
            model = try disk(at: mount.disk, model.byteCount)
            for bitmap in bitmaps { bitmap.replaceDisk(byteCount: model.byteCount) }
        default: note(change)
        }
    }

    /// Changes the structure of the mounted image.
    func changeMounted(_ mount: TestMount) throws {
        guard let change = nextChange() else { return }
        history.append("\(change)")
        try make(change, mount)()
        note(change)
    }

    /// Changes the structure of the image that nobody has mounted, and sometimes the disk too.
    func changeUnmounted() throws {
        if let change = nextChange() {
            // QEMU records no application in bitmaps, and cuts no disk as this program does.
            let isForQEMU = bitmaps.isEmpty && change.newSize == nil && keepsSize(change)
            if isForQEMU, random.chance(oneIn: 2) {
                history.append("QEMU's \(change)")
                try image.snapshot(change.words[1], change.words[2])
            } else {
                history.append("unmounted \(change)")
                try Command.require(program(change))
            }
            note(change)
        }
        if random.chance(oneIn: 2) {
            history.append("qemu-io")
            let writes = combination.writes(&random, 3, in: model.byteCount)
            try image.io(writes.map(\.command))
            for write in writes {
                model[write.range].initializeMemory(as: UInt8.self, repeating: write.byte)
                for bitmap in bitmaps { bitmap.note(write.range) }
            }
        }
    }

    // MARK: Making a change

    /// What makes `change` while the image is mounted: the verb, or the file itself.
    private func make(
        _ change: StructureChange, _ mount: TestMount
    ) -> @Sendable () throws -> Void {
        let old = model.byteCount
        if case .resize(let new, .size) = change, random.chance(oneIn: 2) {
            guard new > old, random.chance(oneIn: 2) else {
                return { try mount.open().truncate(to: new) }
            }
            return { try mount.open().allocate(0, old..<new) }
        }
        let words = program(change)
        return { try Command.require(words) }
    }

    /// What reads, again and again, a snapshot that `change` leaves alone.
    private func snapshotReader(
        beside change: StructureChange, _ mount: TestMount
    ) -> @Sendable () throws -> Void {
        guard let name = anySnapshot(), let kept = snapshots[name], change.words[2] != name else {
            return {}
        }
        let path = snapshotFile(name, of: mount)
        return { for _ in 0..<3 { try Self.compare(path, with: kept) } }
    }

    private func program(_ change: StructureChange) -> [String] {
        var words = change.words
        words.insert(image.path, at: words.count - (change.newSize == nil ? 0 : 1))
        return [TestEnvironment.program] + words + passphraseOptions
    }

    private func note(_ change: StructureChange) {
        switch change {
        case .create(let name): snapshots[name] = model.copy(byteCount: model.byteCount)
        case .apply(let name):
            guard let kept = snapshots[name] else { return }
            model = kept.copy(byteCount: kept.byteCount)
            for bitmap in bitmaps { bitmap.replaceDisk(byteCount: model.byteCount) }
        case .delete(let name): snapshots[name] = nil
        case .resize(let byteCount, _):
            model = model.copy(byteCount: byteCount)
            for bitmap in bitmaps { bitmap.resize(to: byteCount) }
            if combination.dataFile != nil { dataFileByteCount = byteCount }
        }
    }

    private func disk(at path: String, _ byteCount: Int) throws -> ReferenceDisk {
        let disk = ReferenceDisk(byteCount: byteCount)
        try TestFile(path, O_RDONLY).read(into: disk.bytes, at: 0)
        return disk
    }

    // MARK: Choosing one

    /// The next change beside threads: they must not write past the end of another disk, nor must
    /// a kernel that keeps whole pages back.
    private func nextChangeBesideThreads() -> StructureChange? {
        guard let change = nextChange() else { return nil }
        if case .resize(let byteCount, let growth) = change, mountOptions.contains("--writeback") {
            return .resize(byteCount / 4096 * 4096, growth)
        }
        return change.newSize != nil || keepsSize(change) ? change : nil
    }

    /// The next change; nil for none.
    private func nextChange() -> StructureChange? {
        guard combination.hasSnapshots else { return nextSize() }
        // QEMU allows no other size of a version 2 disk with snapshots.
        switch random.number(below: combination.version == 2 ? 8 : 11) {
        case 0..<3 where snapshots.count < 9:
            nextName += 1
            return .create("made\(nextName)")
        case 3..<6:
            return anySnapshot().map { .apply($0) }
        case 0..<3, 6..<8: return snapshots.count > 3 ? anySnapshot().map { .delete($0) } : nil
        default: return nextSize()
        }
    }

    private func anySnapshot() -> String? {
        let names = snapshots.keys.sorted()
        return names.isEmpty ? nil : names[random.number(below: names.count)]
    }

    private func keepsSize(_ change: StructureChange) -> Bool {
        guard case .apply(let name) = change else { return change.newSize == nil }
        return snapshots[name]?.byteCount == model.byteCount
    }

    /// Half of the disk to twice as much; now and then next to nothing, and in a long run enough
    /// for more L2 tables.
    private func nextSize() -> StructureChange {
        let usual = combination.byteCount
        if random.chance(oneIn: 8) {
            return .resize((64.KiB + random.number(below: 192.KiB)) / 512 * 512)
        }
        if TestEnvironment.isLong, combination.clusterSize == 65536, random.chance(oneIn: 12) {
            return .resize((300.MiB + random.number(below: 300.MiB)) / 512 * 512)
        }
        let least = max(usual / 2, 64.KiB)
        let size = (least + random.number(below: usual + usual / 2)) / 512 * 512
        guard size > model.byteCount, random.chance(oneIn: 2) else { return .resize(size) }
        let growths = StructureChange.Growth.allCases
        return .resize(size, growths[random.number(below: growths.count)])
    }
}

extension ReferenceDisk {
    /// The bytes of the disk that was made another size; new ones are zeros.
    func copy(byteCount: Int) -> ReferenceDisk {
        let copy = ReferenceDisk(byteCount: byteCount)
        let range = 0..<min(byteCount, self.byteCount)
        copy.write(UnsafeRawBufferPointer(self[range]), at: 0)
        return copy
    }
}
