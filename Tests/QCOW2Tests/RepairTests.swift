import Foundation
import QCOW2
import TestSupport
import Testing

/// Repairs of damaged images: tables and counts agree again, and the guest reads what it read.
@Suite("Repairing images", .needsQemuImg)
struct RepairTests {
    let folder: TemporaryDirectory
    let image: String

    // Where a new image of 64 KiB clusters has its tables.
    static let refcountTable = 0x10000
    static let refcountBlock = 0x20000
    static let l1 = 0x30000
    static let l2 = 0x40000
    static let copied: UInt64 = 1 << 63

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
        try QemuImg.create(image, size: 8.MiB)
        try QemuImg.io(
            image,
            (0..<4).map { "write -q -P \($0 + 1) \($0 * 128)k 64k" } + ["write -q -z 1M 64k"])
    }

    @Test("A check or a repair that is cancelled changes nothing")
    func cancelled() throws {
        try storeCount(9, of: 5)
        let before = try TestFile(image, O_RDONLY).read(0..<512 << 10)
        #expect {
            try ImageCheck(path: image, progress: { _ in false })
        } throws: { ($0 as? ImageError)?.kind == .cancelled }
        #expect {
            try ImageRepair(path: image, scope: .all, progress: { _ in false })
        } throws: { ($0 as? ImageError)?.kind == .cancelled }
        #expect(try TestFile(image, O_RDONLY).read(0..<512 << 10) == before)
        let repair = try ImageRepair(path: image, scope: .all, progress: { _ in true })
        #expect(repair.fixedLeakCount > 0)
    }

    private func store(_ value: UInt64, at offset: Int) throws {
        let bytes = withUnsafeBytes(of: value.bigEndian) { Array($0) }
        try TestFile(image, O_RDWR).write(bytes, at: offset)
    }

    private func storeCount(_ count: UInt16, of cluster: Int) throws {
        let bytes = [UInt8(count >> 8), UInt8(count & 255)]
        try TestFile(image, O_RDWR).write(bytes, at: Self.refcountBlock + cluster * 2)
    }

    private func disk() throws -> [UInt8] {
        let image = try Image.open(image, options: OpenOptions(access: .readOnly))
        defer { try? image.close() }
        return try image.read(at: 0, count: Int(image.size))
    }

    /// Repairs, expects that nothing is wrong afterwards for QEMU either, and that the disk stays.
    private func expectRepaired(
        _ scope: ImageRepair.Scope = .all, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let before = try disk()
        #expect(try QemuImg.check(image).status != 0, sourceLocation: sourceLocation)
        let repair = try ImageRepair(path: image, scope: scope)
        #expect(repair.check.corruptionCount == 0, sourceLocation: sourceLocation)
        #expect(repair.check.leakCount == 0, sourceLocation: sourceLocation)
        #expect(
            repair.fixedCorruptionCount + repair.fixedLeakCount > 0, sourceLocation: sourceLocation)
        let judged = try QemuImg.check(image)
        #expect(judged.status == 0, "\(judged)", sourceLocation: sourceLocation)
        #expect(try disk() == before, sourceLocation: sourceLocation)
    }

    @Test("a leaked cluster is freed", arguments: [ImageRepair.Scope.leaks, .all])
    func leak(scope: ImageRepair.Scope) throws {
        let length = try TestFile(image, O_RDONLY).byteCount()
        truncate(image, off_t(length + 65536))
        try storeCount(1, of: length / 65536)
        try expectRepaired(scope)
    }

    @Test("a count that is too high on a cluster in use is lowered, and its flag set")
    func tooHigh() throws {
        try storeCount(2, of: 5)
        try store(0x50000, at: Self.l2)
        try expectRepaired()
    }

    @Test("a count that is too low is raised", arguments: [0, 3, 4, 5, 6])
    func tooLow(cluster: Int) throws {
        try storeCount(0, of: cluster)
        try expectRepaired()
    }

    @Test("a wrong COPIED flag is corrected")
    func copiedFlag() throws {
        try store(0x50000, at: Self.l2)
        try expectRepaired()
    }

    @Test("refcounts are made from nothing where table or block cannot be used")
    func rebuild() throws {
        let damages: [(String, UInt64)] = [
            ("missing", 0), ("misaligned", 0x20200), ("outside", 0x7000_0000),
            ("on the L1 table", 0x30000), ("on data", 0x50000), ("on the header", 0x10000),
        ]
        let whole = try TestFile(image, O_RDONLY).read(0..<2.MiB)
        for (name, entry) in damages {
            try Data(whole).write(to: URL(fileURLWithPath: image))
            try store(entry, at: Self.refcountTable)
            try expectRepaired()
            #expect(
                try Command.run(["qemu-io", "-c", "write 4M 1M", image]).status == 0, "\(name)")
            #expect(try QemuImg.check(image).status == 0, "\(name)")
        }
    }

    @Test("two guest clusters in one host cluster keep their bytes, also when one is written")
    func doubleReference() throws {
        try store(0x50000 | Self.copied, at: Self.l2 + 2 * 8)
        try expectRepaired()
        let before = try disk()
        try QemuImg.io(image, ["write -q -P 0x77 0 64k"])
        let after = try disk()
        #expect(Array(after[131072...]) == Array(before[131072...]))
        #expect(after[0..<65536].allSatisfy { $0 == 0x77 })
    }

    @Test("data in a refcount block's cluster keeps its bytes where a count cannot say so")
    func dataOnBlockOfOneBit() throws {
        try QemuImg.create(image, size: 8.MiB, options: ["refcount_bits=1"])
        try QemuImg.io(image, ["write -q -P 1 0 1M"])
        try store(0x50000, at: Self.refcountTable)
        try expectRepaired()
    }

    @Test("data in an L2 table's cluster keeps its bytes where a count cannot say so")
    func dataOnTableOfOneBit() throws {
        try QemuImg.create(image, size: 8.MiB, options: ["refcount_bits=1"])
        try QemuImg.io(image, ["write -q -P 1 0 1M"])
        try store(0x40000 | Self.copied, at: Self.l2 + 40 * 8)
        try store(0x50000, at: Self.l2)
        let before = try disk()
        _ = try ImageRepair(path: image, scope: .all)
        #expect(try disk() == before)
    }

    @Test("zeros past the end of a file that was cut short are still zeros")
    func cutShort() throws {
        try QemuImg.io(image, ["write -q -P 1 0 4M"])
        truncate(image, 2 << 20)
        try store(0, at: Self.refcountTable)
        let before = try disk()
        #expect(before[3.MiB..<4.MiB].allSatisfy { $0 == 0 })
        _ = try ImageRepair(path: image, scope: .all)
        #expect(try disk() == before)
    }

    @Test("data in the same cluster as the L1 table keeps its bytes; the table moves")
    func dataOnL1() throws {
        try store(0x30000 | Self.copied, at: Self.l2 + 40 * 8)
        try expectRepaired()
        let before = try disk()
        try QemuImg.io(image, ["write -q -P 0x77 6M 64k"])
        let after = try disk()
        #expect(Array(after[..<6.MiB]) == Array(before[..<6.MiB]))
    }

    @Test("a snapshot keeps what it holds")
    func snapshot() throws {
        try QemuImg.snapshot(image, create: "s")
        try QemuImg.io(image, ["write -q -P 9 0 64k"])
        let old = folder.file("old.raw")
        let new = folder.file("new.raw")
        try Command.require("qemu-img", "convert", "-l", "s", "-O", "raw", image, old)
        for cluster in 3..<12 { try storeCount(0, of: cluster) }
        try expectRepaired()
        try Command.require("qemu-img", "convert", "-l", "s", "-O", "raw", image, new)
        try Command.require("cmp", old, new)
    }

    @Test("--repair leaks leaves corruptions as they are")
    func leaksOnly() throws {
        try storeCount(0, of: 5)
        let before = try Command.require("sha256sum", image)
        let repair = try ImageRepair(path: image, scope: .leaks)
        #expect(repair.check.corruptionCount > 0)
        #expect(try Command.require("sha256sum", image) == before)
    }

    @Test(
        "--repair leaks changes nothing where a refcount block is something else too",
        arguments: [0x30000, 0x40000, 0x50000])
    func leaksOfStrangers(place: UInt64) throws {
        try store(place, at: Self.refcountTable)
        let before = try Command.require("sha256sum", image)
        _ = try ImageRepair(path: image, scope: .leaks)
        #expect(try Command.require("sha256sum", image) == before)
    }

    @Test("--repair leaks adds no corruption beside one that it leaves")
    func leaksBesideCorruption() throws {
        try storeCount(0, of: 6)
        try storeCount(2, of: 5)
        try store(0x50000, at: Self.l2)
        let length = try TestFile(image, O_RDONLY).byteCount()
        truncate(image, off_t(length + 65536))
        try storeCount(1, of: length / 65536)
        let before = try ImageCheck(path: image)
        let repair = try ImageRepair(path: image, scope: .leaks)
        #expect(repair.fixedLeakCount == 2 && repair.check.leakCount == 0)
        #expect(repair.check.corruptionCount == before.corruptionCount)
    }

    @Test(
        "nobody gets a cluster that a file lacks which was cut short", arguments: ["0.10", "1.1"],
        ["leaks", "all", "rebuild"])
    func cutShortAndWritten(version: String, repair: String) throws {
        try QemuImg.create(image, size: 8.MiB, options: ["compat=\(version)"])
        try QemuImg.io(image, ["write -q -P 1 0 1M"])
        truncate(image, 13 << 16)
        if repair == "rebuild" { try store(0, at: Self.refcountTable) }
        let before = try ImageCheck(path: image)
        let after = try ImageRepair(path: image, scope: repair == "leaks" ? .leaks : .all)
        #expect(after.check.corruptionCount <= before.corruptionCount)
        // Who writes in spite of the mark.
        if version == "1.1" { try store(0, at: 72) }
        let disk = try disk()
        let open = try Image.open(image)
        try open.write([UInt8](repeating: 7, count: 1.MiB), at: 4.MiB)
        try open.close()
        let written = try self.disk()
        #expect(written[..<4.MiB] == disk[..<4.MiB])
        #expect(written[4.MiB..<5.MiB].allSatisfy { $0 == 7 })
    }

    @Test("leaks stay while references may be hidden behind a damaged entry")
    func hiddenReferences() throws {
        try store(0x40200 | Self.copied, at: Self.l1)
        let repair = try ImageRepair(path: image, scope: .leaks)
        #expect(repair.undoPath == nil)
        #expect(try QemuImg.check(image).status == 2)
    }

    @Test("what cannot be repaired is left, and marks the image corrupt")
    func beyondRepair() throws {
        try store(0x50200 | Self.copied, at: Self.l2)
        let repair = try ImageRepair(path: image, scope: .all)
        #expect(repair.check.corruptionCount > 0)
        #expect(throws: ImageError(.markedCorrupt, file: image)) { try Image.open(image) }
        let info = try Command.require("qemu-img", "info", image)
        #expect(info.contains("corrupt: true"))
    }

    @Test("dirty and corrupt bits go when nothing is wrong any more")
    func marks() throws {
        try store(3, at: 72)
        let repair = try ImageRepair(path: image, scope: .all)
        #expect(repair.check.corruptionCount == 0)
        let info = try Command.require("qemu-img", "info", "--output=json", image)
        #expect(info.contains("\"dirty-flag\": false"))
        #expect(info.contains("\"corrupt\": false"))
    }

    @Test("a repair can be taken back, unless the image was written since")
    func undo() throws {
        try storeCount(0, of: 5)
        try store(0, at: Self.refcountTable)
        let before = try Command.shell("sha256sum < \(image)")
        let repair = try ImageRepair(path: image, scope: .all)
        let undo = try #require(repair.undoPath)
        #expect(try Command.shell("sha256sum < \(image)") != before)
        try ImageRepair.undo(path: image, undoPath: undo)
        #expect(try Command.shell("sha256sum < \(image)") == before)

        let second = try ImageRepair(path: image, scope: .all)
        try QemuImg.io(image, ["write -q -P 9 4M 1M"])
        let written = try Command.shell("sha256sum < \(image)")
        #expect(throws: ImageError.self) {
            try ImageRepair.undo(path: image, undoPath: try #require(second.undoPath))
        }
        #expect(try Command.shell("sha256sum < \(image)") == written)
    }

    @Test("every bit is as before when a repair is taken back, marks and all")
    func undoEverything() throws {
        try storeCount(0, of: 5)
        try storeCount(7, of: 6)
        for marks: UInt64 in [0, 1, 2, 3] {
            try store(marks, at: 72)
            let before = try Command.shell("sha256sum < \(image)")
            let repair = try ImageRepair(path: image, scope: .all)
            #expect(repair.check.corruptionCount == 0)
            try ImageRepair.undo(path: image, undoPath: try #require(repair.undoPath))
            #expect(try Command.shell("sha256sum < \(image)") == before, "marks \(marks)")
        }
        // What cannot be repaired gets the corrupt bit.
        try store(0, at: 72)
        try store(0x50200 | Self.copied, at: Self.l2)
        let before = try Command.shell("sha256sum < \(image)")
        let repair = try ImageRepair(path: image, scope: .all)
        #expect(repair.check.corruptionCount > 0)
        try ImageRepair.undo(path: image, undoPath: try #require(repair.undoPath))
        #expect(try Command.shell("sha256sum < \(image)") == before)
    }

    @Test("a repair that was interrupted can be taken back")
    func undoInterrupted() throws {
        try storeCount(0, of: 5)
        try storeCount(7, of: 6)
        try store(0x50000, at: Self.l2)
        let before = try Command.shell("sha256sum < \(image)")
        for call in 0..<3 {
            let undo = folder.file("undo-\(call)")
            let device = try FileDevice(path: image, access: .readWrite)
            #expect(throws: ImageError.self) {
                try ImageRepair(
                    on: FaultyDevice(device, .init(.write, call: call)), scope: .all,
                    undoPath: undo)
            }
            device.close()
            #expect((try Command.shell("sha256sum < \(image)") == before) == (call == 0))
            try ImageRepair.undo(path: image, undoPath: undo)
            #expect(try Command.shell("sha256sum < \(image)") == before)
        }
    }

    @Test("whatever is damaged, a repair changes nothing that the guest can read")
    func randomDamage() throws {
        let seed = TestEnvironment.seed
        var random = RepeatableRandom(seed: seed)
        try QemuImg.snapshot(image, create: "s")
        try QemuImg.io(image, ["write -q -P 9 0 192k"])
        let whole = try TestFile(image, O_RDONLY).read(0..<4.MiB)
        for round in 0..<150 {
            var bytes = whole
            for _ in 0...random.number(below: 4) {
                // The refcount table's and block's beginning, the L1 and L2 tables' beginning.
                let table = [0x10000, 0x20000, 0x30000, 0x40000][random.number(below: 4)]
                let place = table + random.number(below: 64)
                bytes[place] = UInt8(truncatingIfNeeded: random.next())
            }
            try Data(bytes).write(to: URL(fileURLWithPath: image))
            let before = try readableClusters()
            guard let before, (try? ImageRepair(path: image, scope: .all)) != nil else { continue }
            let after = try #require(try readableClusters())
            for (cluster, content) in before.enumerated() where content != nil {
                #expect(
                    after[cluster] == content, "round \(round) of seed \(seed), cluster \(cluster)")
            }
        }
    }

    /// What each guest cluster reads, nil where it cannot be read; nil where nothing can be opened.
    private func readableClusters() throws -> [[UInt8]?]? {
        guard let image = try? Image.open(image, options: OpenOptions(access: .readOnly)) else {
            return nil
        }
        defer { try? image.close() }
        return (0..<32).map { try? image.read(at: UInt64($0) << 16, count: 1 << 16) }
    }
}
