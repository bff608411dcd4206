import Glibc
import TestSupport
import Testing

/// Every kind of plain image through a real mount, beside a model.
@Suite("Random run", .serialized)
struct RandomRunTests {
    @Test(
        "A disk used by several threads equals its model", .enabledWhereMountable,
        arguments: Combination.allowed)
    func equalsModel(_ combination: Combination) throws {
        let seed = TestEnvironment.seed
        do {
            try RandomRun(combination: combination, seed: seed).run()
        } catch {
            Issue.record("\(combination.testDescription), seed \(seed): \(error)")
        }
    }

    @Test(
        "So does a disk with subclusters", .enabledWhereMountable,
        arguments: Combination.extended)
    func equalsModelWithSubclusters(_ combination: Combination) throws {
        let seed = TestEnvironment.seed + 3
        do {
            try RandomRun(combination: combination, seed: seed).run()
        } catch {
            Issue.record("\(combination.testDescription), seed \(seed): \(error)")
        }
    }

    @Test(
        "So does a disk mounted with --writeback on", .enabledWhereMountable,
        arguments: Combination.allowed.filter { $0.refcountBits == 16 && $0.version == 3 })
    func equalsModelWithWriteback(_ combination: Combination) throws {
        let seed = TestEnvironment.seed + 1
        do {
            var run = RandomRun(combination: combination, seed: seed)
            run.mountOptions = ["--writeback", "on"]
            run.roundCount = 1
            try run.run()
        } catch {
            Issue.record("\(combination.testDescription), seed \(seed): \(error)")
        }
    }

    @Test(
        "So does a disk mounted with little memory, two threads, or past the page cache",
        .enabledWhereMountable,
        arguments: [
            ["--cache-size", "1M", "--threads", "2"], ["--direct"],
            ["--direct", "--writeback", "on"], ["--commit-interval", "1", "--cache-size", "1M"],
        ], [Combination.Content.chainOfFive, .zstd, .snapshots])
    func equalsModelWithOptions(options: [String], content: Combination.Content) throws {
        for clusterSize in [512, 65536] {
            let combination = Combination(
                clusterSize: clusterSize, version: 3, refcountBits: 16, content: content)
            var run = RandomRun(combination: combination, seed: TestEnvironment.seed + 2)
            run.mountOptions = options
            do { try run.run() } catch {
                Issue.record("\(options), \(combination.testDescription): \(error)")
            }
        }
    }

    @Test(
        "The judge of these runs notices one changed byte", .enabledWhereMountable,
        arguments: [
            Combination.Content.plain, .snapshots,
        ])
    func judgeNotices(_ content: Combination.Content) throws {
        var run = RandomRun(
            combination: Combination(
                clusterSize: 4096, version: 3, refcountBits: 16, content: content),
            seed: TestEnvironment.seed)
        run.roundCount = 1
        run.tamper = { image in
            // A host cluster that holds guest data, found by the tests' own reader.
            let host = try Self.dataCluster(of: image)
            let file = try TestFile(image, O_RDWR)
            let byte = try file.read(host..<host + 1)
            try file.write([byte[0] ^ 0xFF], at: host)
        }
        #expect(throws: RandomRun.Difference.self) { try run.run() }
    }

    private static func dataCluster(of image: String) throws -> Int {
        let reader = try ReferenceImage(image).qcow2
        for cluster in 0..<reader.byteCount / reader.clusterSize {
            let raw = try reader.rawEntry(forGuestCluster: cluster, in: reader.active)
            if case .normal(let host) = try reader.entry(raw) { return host }
        }
        throw RandomRun.Difference(description: "no data to tamper with")
    }

    @Test("The format excludes what the random runs leave out")
    func exclusions() {
        let excluded = Combination.every.filter { $0.exclusion != nil }
        #expect(excluded.count + Combination.allowed.count == 4 * 2 * 4 * 8)
        // Per cluster size: v2 with three other widths (24), v2 zstd, v2 zero clusters, and
        // snapshots with 1-bit counts.
        #expect(excluded.count == 4 * (24 + 1 + 1 + 1))
        print(
            "• \(Combination.allowed.count) combinations; left out: "
                + Set(excluded.compactMap(\.exclusion)).sorted().joined(separator: "; "))
    }

    @Test("QEMU refuses what the random runs leave out", .enabledWhereMountable)
    func qemuAgrees() throws {
        let folder = try TemporaryDirectory()
        for options in [
            ["compat=0.10", "refcount_bits=8"], ["compat=0.10", "compression_type=zstd"],
        ] {
            #expect(throws: Command.Failure.self) {
                try QemuImg.create(folder.file("no.qcow2"), size: 1.MiB, options: options)
            }
        }
        let narrow = folder.file("narrow.qcow2")
        try QemuImg.create(narrow, size: 1.MiB, options: ["refcount_bits=1"])
        try QemuImg.io(narrow, ["write -P 1 0 64k"])
        #expect(throws: Command.Failure.self) { try QemuImg.snapshot(narrow, create: "no") }
    }
}
