import Glibc
import QCOW2
import TestSupport
import Testing

/// Moving clusters into free space, judged by QEMU and by the tests' own reader.
@Suite("Compaction", .needsQemuImg)
struct CompactTests {
    /// An image with holes: what it is made with, and what is done to it before and after a
    /// snapshot.
    struct Subject: CustomTestStringConvertible, Sendable {
        var options: [String] = []
        var size = 24.MiB
        var commands = ["write -q -P 1 0 8M", "write -q -P 2 12M 4M"]
        var hasSnapshot = false
        var holes = [
            "discard -q 0 4M", "discard -q 5M 1M", "write -q -P 3 12288k 192k",
            "write -q -z 13M 300k", "write -q -P 4 20M 64k",
        ]

        var testDescription: String {
            options.joined(separator: ",") + (hasSnapshot ? " with a snapshot" : "")
        }
    }

    static let subjects: [Subject] =
        [
            ["cluster_size=512"], ["cluster_size=4k", "refcount_bits=1"], ["compat=0.10"],
            ["cluster_size=16k", "extended_l2=on"], ["refcount_bits=64", "cluster_size=128k"],
            ["cluster_size=1k", "refcount_bits=8", "lazy_refcounts=on"], ["cluster_size=2M"],
            ["preallocation=metadata", "cluster_size=8k"],
        ].flatMap { options in
            [false, true].compactMap { hasSnapshot in
                hasSnapshot && options.contains("refcount_bits=1")
                    ? nil : Subject(options: options, hasSnapshot: hasSnapshot)
            }
        }

    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    private func make(_ subject: Subject) throws {
        try QemuImg.create(image, size: subject.size, options: subject.options)
        try QemuImg.io(image, subject.commands)
        if subject.hasSnapshot {
            try QemuImg.snapshot(image, create: "first")
            try QemuImg.io(image, ["write -q -P 9 2M 2M", "write -q -P 8 22M 512k"])
            try QemuImg.snapshot(image, create: "kept")
            try Command.require("qemu-img", "snapshot", "-d", "first", image)
        }
        try QemuImg.io(image, subject.holes)
    }

    /// A digest of the disk and of each snapshot.
    private func content(_ path: String? = nil) throws -> [String] {
        let names = try QemuImg.info(path ?? image).snapshots.map(\.name)
        return try ([nil] + names).map { name in
            let raw = folder.file("content.raw")
            let source = name.map { ["-l", "snapshot.name=\($0)"] } ?? []
            try Command.require(
                ["qemu-img", "convert", "-O", "raw"] + source + [path ?? image, raw])
            return try Command.require("sha256sum", raw)
        }
    }

    private var byteCount: Int { get throws { try TestFile(image, O_RDONLY).byteCount() } }
    private var sum: String { get throws { try Command.require("sha256sum", image) } }

    /// What the tests' own reader finds: free clusters before the end, and the bitmaps' marks.
    private func examine() throws -> (freeCount: Int, clusterSize: Int, bitmaps: [[Int]]) {
        let bytes = try TestFile(image, O_RDONLY).read(0..<byteCount)
        return try bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            let audit = reader.audit()
            #expect(audit.faults.isEmpty && audit.leakCount == 0, "\(audit)")
            let free = (0..<reader.fileClusterCount).count { reader.refcount(of: $0) == 0 }
            return (free, reader.clusterSize, try reader.bitmaps().map(\.marked))
        }
    }

    private func expectClean(sourceLocation: SourceLocation = #_sourceLocation) throws {
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)", sourceLocation: sourceLocation)
    }

    /// Compacts the image, and expects it to read the same, to be sound, and to be done.
    @discardableResult
    private func compact(
        leaving freeCount: Int = 0, sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> Compaction {
        let (before, length) = try (content(), byteCount)
        let bitmaps = try examine().bitmaps
        let done = try Image.compact(image)
        try expectClean(sourceLocation: sourceLocation)
        let after = try examine()
        #expect(try content() == before, sourceLocation: sourceLocation)
        #expect(after.bitmaps == bitmaps, sourceLocation: sourceLocation)
        #expect(after.freeCount <= freeCount, sourceLocation: sourceLocation)
        #expect(try done.oldByteCount == length && done.newByteCount == byteCount)
        let (sum, again) = try (sum, Image.compact(image))
        #expect(try again.isNothing && self.sum == sum, sourceLocation: sourceLocation)
        return done
    }

    @Test("The file keeps no free cluster, and all reads as before", arguments: subjects)
    func shrinks(_ subject: Subject) throws {
        try make(subject)
        // A table of several clusters may find no room in one piece.
        let done = try compact(leaving: subject.options.contains("cluster_size=512") ? 40 : 0)
        #expect(done.newByteCount < done.oldByteCount)
        try QemuImg.io(image, ["write -q -P 7 1M 3M", "write -q -P 7 23M 100k"])
        try expectClean()
    }

    @Test("The file is as short as a copy of it", arguments: ["512", "4k", "64k"])
    func asShortAsACopy(clusterSize: String) throws {
        try make(Subject(options: ["cluster_size=\(clusterSize)"]))
        let copy = folder.file("copy.qcow2")
        try QemuImg.convert(
            image, to: copy, from: "qcow2", flags: ["-o", "cluster_size=\(clusterSize)", "-S", "0"])
        let copied = try TestFile(copy, O_RDONLY).byteCount()
        try compact(leaving: 40)
        #expect(try byteCount <= copied + 64.KiB)
    }

    @Test(
        "Compressed clusters move stream by stream",
        arguments: ["zlib", "zstd"], ["4k", "64k", "512k"])
    func streams(method: String, clusterSize: String) throws {
        let raw = folder.file("disk.raw")
        var random = RepeatableRandom(seed: TestEnvironment.seed)
        var bytes = [UInt8](repeating: 7, count: 24.MiB)
        for start in stride(from: 0, to: bytes.count, by: 4096) {
            for word in 0..<random.number(below: 400) {
                bytes.put(random.next(), at: start + word * 8)
            }
        }
        try TestFile(raw, O_RDWR | O_CREAT).write(bytes, at: 0)
        try QemuImg.convert(
            raw, to: image,
            flags: [
                "-c", "-o", "compression_type=\(method),cluster_size=\(clusterSize)",
            ])
        try QemuImg.io(image, ["discard -q 2M 10M", "write -q -P 1 8M 4M", "discard -q 8M 2M"])
        try QemuImg.snapshot(image, create: "kept")
        try QemuImg.io(image, ["discard -q 14M 4M", "write -q -P 5 6M 128k", "discard -q 6M 64k"])
        let done = try compact(leaving: 8)
        #expect(done.newByteCount < done.oldByteCount && done.movedClusterCount > 0)
    }

    @Test("Bitmaps keep their marks", arguments: ["512", "64k"])
    func bitmaps(clusterSize: String) throws {
        try make(Subject(options: ["cluster_size=\(clusterSize)"]))
        for (name, granularity) in [("fine", "512"), ("coarse", "64k"), ("third", "4k")] {
            try Command.require("qemu-img", "bitmap", "--add", "-g", granularity, image, name)
            try QemuImg.io(image, ["write -q -P 6 7M 1M", "discard -q 5M 1M"])
        }
        try Command.require("qemu-img", "bitmap", "--disable", image, "coarse")
        try QemuImg.io(image, ["write -q -P 6 16M 1k", "discard -q 12M 2M"])
        try compact(leaving: 40)
        #expect(try QemuImg.info(image).bitmaps.map(\.name) == ["fine", "coarse", "third"])
    }

    @Test("Tables that say nothing go, down to the smallest image", arguments: ["512", "64k"])
    func everythingDiscarded(clusterSize: String) throws {
        try QemuImg.create(image, size: 64.MiB, options: ["cluster_size=\(clusterSize)"])
        let empty = try byteCount
        try QemuImg.io(image, ["write -q -P 1 0 40M", "discard -q 0 40M"])
        let done = try compact(leaving: clusterSize == "512" ? 8 : 0)
        #expect(done.freedTableCount > 0)
        // Room in the refcount table stays.
        #expect(try byteCount <= empty + 64.KiB)
    }

    @Test("A table stays that hides a backing file")
    func overBacking() throws {
        try QemuImg.create(folder.file("base.qcow2"), size: 24.MiB)
        try QemuImg.io(folder.file("base.qcow2"), ["write -q -P 1 0 24M"])
        try QemuImg.create(image, options: ["cluster_size=4k"], backing: "base.qcow2")
        try QemuImg.io(image, ["write -q -P 2 0 16M", "discard -q 0 8M", "write -q -z 20M 2M"])
        try compact()
    }

    @Test("An external data file is not touched", arguments: ["on", "off"])
    func dataFile(raw: String) throws {
        let data = folder.file("data")
        try QemuImg.create(
            image, size: 64.MiB,
            options: ["cluster_size=4k", "data_file=\(data)", "data_file_raw=\(raw)"])
        try QemuImg.io(image, ["write -q -P 1 0 48M", "discard -q 8M 40M", "write -q -P 2 60M 9k"])
        let sum = try Command.require("sha256sum", data)
        let before = try content()
        let done = try Image.compact(image)
        #expect(done.newByteCount < done.oldByteCount)
        try expectClean()
        #expect(try content() == before && Command.require("sha256sum", data) == sum)
    }

    @Test("Leaked clusters are free clusters")
    func leaks() throws {
        try make(Subject(options: ["cluster_size=4k"]))
        // QEMU dies with clusters reserved and not linked.
        var bytes = try TestFile(image, O_RDONLY).read(0..<byteCount)
        let block = try bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            return Int(reader.number(reader.refcountTableOffset))
        }
        for cluster in 100..<120 where bytes.number(at: block + cluster * 2, as: UInt16.self) == 0 {
            bytes.put(UInt16(1), at: block + cluster * 2)
        }
        try TestFile(image, O_WRONLY).write(bytes, at: 0)
        #expect(try QemuImg.check(image).status == 3)
        let done = try Image.compact(image)
        #expect(done.freedLeakCount > 0)
        try expectClean()
    }

    @Test("An image with errors or marked corrupt is refused and unchanged")
    func refusals() throws {
        try make(Subject(options: ["cluster_size=4k"]))
        var bytes = try TestFile(image, O_RDONLY).read(0..<byteCount)
        let block = try bytes.withUnsafeBytes { bytes in
            let reader = try ReferenceReader(bytes)
            return Int(reader.number(reader.refcountTableOffset))
        }
        bytes.put(UInt16(0), at: block + 4)
        try TestFile(image, O_WRONLY).write(bytes, at: 0)
        let before = try sum
        #expect(throws: ImageError.self) { try Image.compact(image) }
        #expect(try sum == before)
        try TestFile(image, O_WRONLY).write([2], at: 79)
        let error = #expect(throws: ImageError.self) { try Image.compact(image) }
        #expect(error?.kind == .markedCorrupt)
    }

    @Test("Progress rises to the end, and a compaction that is cancelled leaves a sound image")
    func cancelled() throws {
        try make(Subject(options: ["cluster_size=4k"], hasSnapshot: true))
        let (before, start) = try (content(), TestFile(image, O_RDONLY).read(0..<byteCount))
        for limit in [0, 1, 2, 3, 5, 9, Int.max] {
            unlink(image)
            try TestFile(image, O_RDWR | O_CREAT).write(start, at: 0)
            var parts: [Double] = []
            do throws(ImageError) {
                try Image.compact(image) {
                    parts.append($0)
                    return parts.count <= limit
                }
                #expect(parts.last == 1)
            } catch { #expect(error.kind == .cancelled && limit < .max) }
            #expect(parts == parts.sorted() && parts.allSatisfy { (0...1).contains($0) })
            try expectClean()
            #expect(try content() == before)
        }
    }
}
