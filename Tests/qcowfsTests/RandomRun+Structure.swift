import Glibc
import TestSupport

/// A change that random runs make of an image's structure.
enum StructureChange: Sendable {
    case create(String)
    case apply(String)
    case delete(String)
    case resize(Int)

    /// Bytes of the disk afterwards, where they may be others than before.
    var newSize: Int? { if case .resize(let byteCount) = self { byteCount } else { nil } }

    var replacesDisk: Bool { if case .apply = self { true } else { false } }

    /// What qemu-img and the program call it.
    var words: [String] {
        switch self {
        case .create(let name): ["snapshot", "-c", name]
        case .apply(let name): ["snapshot", "-a", name]
        case .delete(let name): ["snapshot", "-d", name]
        case .resize(let byteCount): ["resize", "--shrink", "\(byteCount)"]
        }
    }
}

/// Snapshots and other sizes, in between and beside.
extension RandomRun {
    /// Threads use the disk while, half of the times, its structure changes.
    func useAndChange(_ mount: TestMount, part: Int) throws {
        let steps = TestEnvironment.isLong ? 100 : 20
        guard random.chance(oneIn: 2), let change = nextChange(besideThreads: true) else {
            history.append("use")
            return try use(mount, part: part, steps: steps)
        }
        history.append("use beside \(change)")
        let make = make(change, mount)
        let delay = UInt32(random.number(below: 6000))
        try use(mount, part: part, steps: steps, beside: change) {
            usleep(delay)
            try make()
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
        if let newSize = change.newSize, random.chance(oneIn: 2) {
            return { try mount.open().truncate(to: newSize) }
        }
        let words = program(change)
        return { try Command.require(words) }
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
        case .resize(let byteCount):
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

    /// The next change; nil for none.
    ///
    /// Beside threads only a disk of the same size is applied: they would write past another's end.
    private func nextChange(besideThreads: Bool = false) -> StructureChange? {
        guard combination.hasSnapshots else { return .resize(nextSize()) }
        // QEMU allows no other size of a version 2 disk with snapshots.
        switch random.number(below: combination.version == 2 ? 8 : 11) {
        case 0..<3:
            nextName += 1
            return .create("made\(nextName)")
        case 3..<6:
            guard let name = anySnapshot() else { return nil }
            return besideThreads && !keepsSize(.apply(name)) ? nil : .apply(name)
        case 6..<8: return snapshots.count > 3 ? anySnapshot().map { .delete($0) } : nil
        default: return .resize(nextSize())
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

    /// Half of the disk to twice as much, and in a long run now and then enough for more L2 tables.
    private func nextSize() -> Int {
        let usual = combination.byteCount
        if TestEnvironment.isLong, combination.clusterSize == 65536, random.chance(oneIn: 12) {
            return (300.MiB + random.number(below: 300.MiB)) / 512 * 512
        }
        let least = max(usual / 2, 64.KiB)
        return (least + random.number(below: usual + usual / 2)) / 512 * 512
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
