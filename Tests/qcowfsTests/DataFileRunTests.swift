import Glibc
import TestSupport
import Testing

/// Random runs through a real mount for images with an external data file.
@Suite("Random run with a data file", .serialized)
struct DataFileRunTests {
    /// An image whose data lies in a file of its own.
    struct Subject: RandomRunSubject, CustomTestStringConvertible {
        enum Kind: String, CaseIterable, Sendable {
            case plain
            case raw
            case overlay = "plain over a backing file"
            case preallocated = "plain, preallocated"
        }

        let clusterSize: Int
        let kind: Kind

        var testDescription: String { "\(clusterSize) B, \(kind.rawValue)" }

        /// The last cluster is not whole.
        private var byteCount: Int { max(4.MiB, clusterSize * 16) + 1536 }

        func prepare(
            in folder: TemporaryDirectory, seed: UInt64
        ) throws -> Combination.Prepared {
            var random = RepeatableRandom(seed: seed)
            let image = folder.file("disk.qcow2")
            let data = folder.file("disk.data")
            var options = ["cluster_size=\(clusterSize)", "data_file=\(data)"]
            if kind == .raw { options.append("data_file_raw=on") }
            if kind == .preallocated { options.append("preallocation=metadata") }
            if kind == .overlay {
                let base = ReferenceDisk(byteCount: byteCount * 5 / 8)
                for _ in 0..<30 { base.scribble(&random, upTo: clusterSize * 2) }
                try base.save(to: folder.file("base.raw"))
            }
            try QemuImg.create(
                image, size: byteCount, options: options,
                backing: kind == .overlay ? "base.raw" : nil, backingFormat: "raw")
            try QemuImg.io(image, commands(&random))
            let before = folder.file("before.raw")
            try QemuImg.convert(image, to: before, from: "qcow2", format: "raw")
            var prepared = Combination.Prepared(
                image: image, model: try ReferenceDisk(contentsOf: before), snapshots: [:])
            if kind == .raw {
                let byteCount = try TestFile(data, O_RDONLY).byteCount()
                prepared.alsoJudge = { try Self.expectEqual(data, $0, byteCount) }
            }
            return prepared
        }

        private func commands(_ random: inout RepeatableRandom) -> [String] {
            (0..<16).map { index in
                let most = max(8, clusterSize * 3 / 512)
                let count = min(1 + random.number(below: most), byteCount / 1024) * 512
                let offset = random.number(below: (byteCount - count) / 512 + 1) * 512
                switch index % 4 {
                case 2: return "write -q -z \(offset) \(count)"
                case 3: return "write -q -z -u \(offset) \(count)"
                default: return "write -q -P \(1 + random.number(below: 255)) \(offset) \(count)"
                }
            }
        }

        /// A raw data file is the disk, as long as QEMU made it: with whole clusters.
        private static func expectEqual(
            _ path: String, _ model: ReferenceDisk, _ byteCount: Int
        ) throws {
            let file = try TestFile(path, O_RDONLY)
            let disk = 0..<model.byteCount
            let bytes = try file.read(disk)
            let place = bytes.withUnsafeBytes { model.firstDifference(in: disk, from: $0) }
            if try file.byteCount() != byteCount || place != nil {
                throw RandomRun.Difference(
                    description: "the raw data file has \(try file.byteCount()) bytes instead of "
                        + "\(byteCount), or differs from the disk at \(place ?? disk.upperBound)")
            }
        }

        static let all = [512, 4096, 65536, 2 << 20].flatMap { size in
            Kind.allCases.map { Subject(clusterSize: size, kind: $0) }
        }
    }

    @Test(
        "A disk with a data file, used by several threads, equals its model; a raw file too",
        .enabledWhereMountable, arguments: Subject.all)
    func equalsModel(_ subject: Subject) throws {
        let seed = TestEnvironment.seed
        do {
            try RandomRun(combination: subject, seed: seed).run()
        } catch {
            Issue.record("\(subject.testDescription), seed \(seed): \(error)")
        }
    }

    @Test(
        "So does one mounted past the page cache, with write-back or little memory",
        .enabledWhereMountable,
        arguments: [
            ["--direct"], ["--writeback", "on"], ["--commit-interval", "1", "--cache-size", "1M"],
        ], Subject.Kind.allCases)
    func equalsModelWithOptions(options: [String], kind: Subject.Kind) throws {
        var run = RandomRun(
            combination: Subject(clusterSize: 4096, kind: kind), seed: TestEnvironment.seed + 3)
        run.mountOptions = options
        do { try run.run() } catch { Issue.record("\(options), \(kind.rawValue): \(error)") }
    }
}
