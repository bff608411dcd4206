import Glibc
import TestSupport
import Testing

/// Every kind of image through a real mount, beside a model.
@Suite("Random run", .serialized, .enabledWhereMountable)
struct RandomRunTests {
    /// Runs, and tells what is needed to run the same once more.
    private func run(
        _ combination: Combination, seed offset: UInt64 = 0, changesStructure: Bool = false,
        options: [String] = [], roundCount: Int? = nil
    ) {
        let seed = TestEnvironment.seed + offset
        do {
            let run = try RandomRun(combination, seed: seed, changesStructure: changesStructure)
            run.mountOptions = options
            run.roundCount = roundCount ?? run.roundCount
            try run.run()
        } catch {
            Issue.record("\(options) \(combination.testDescription), seed \(seed): \(error)")
        }
    }

    @Test(
        "A disk used by several threads equals its model", arguments: Combination.allowed)
    func equalsModel(_ combination: Combination) { run(combination) }

    @Test("So does a disk with subclusters", arguments: Combination.extended)
    func equalsModelWithSubclusters(_ combination: Combination) { run(combination, seed: 3) }

    @Test("So does a disk with a data file; a raw one too", arguments: Combination.withDataFile)
    func equalsModelWithDataFile(_ combination: Combination) { run(combination) }

    @Test("So does an encrypted disk", arguments: Combination.encrypted)
    func equalsModelEncrypted(_ combination: Combination) { run(combination, seed: 37) }

    @Test("Bitmaps mark exactly what several threads changed", arguments: Combination.withBitmaps)
    func bitmapsMarkChanges(_ combination: Combination) { run(combination, seed: 3) }

    @Test(
        """
        A disk, its snapshots and bitmaps equal their models while snapshots are made, applied and \
        deleted and the disk grows and shrinks
        """, arguments: Combination.changing)
    func equalsModelWhileStructureChanges(_ combination: Combination) {
        run(combination, seed: 5, changesStructure: true)
    }

    // MARK: Mounted otherwise

    @Test(
        "A disk mounted with --writeback on equals its model",
        arguments: Combination.allowed.filter { $0.refcountBits == 16 && $0.version == 3 })
    func equalsModelWithWriteback(_ combination: Combination) {
        run(combination, seed: 1, options: ["--writeback", "on"], roundCount: 1)
    }

    @Test(
        "So does a disk mounted with little memory, two threads, or past the page cache",
        arguments: [
            ["--cache-size", "1M", "--threads", "2"], ["--direct"],
            ["--direct", "--writeback", "on"], ["--commit-interval", "1", "--cache-size", "1M"],
        ],
        [512, 65536].flatMap { size in
            [
                Combination(clusterSize: size, content: .chainOfFive),
                Combination(clusterSize: size, content: .zstd),
                Combination(clusterSize: size, hasSnapshots: true),
            ]
        })
    func equalsModelWithOptions(options: [String], combination: Combination) {
        run(combination, seed: 2, options: options)
    }

    @Test(
        "So does a disk with a data file, with write-back, little memory or past the page cache",
        arguments: [
            ["--direct"], ["--writeback", "on"], ["--commit-interval", "1", "--cache-size", "1M"],
        ], Combination.withDataFile.filter { $0.clusterSize == 4096 })
    func equalsModelWithDataFileAndOptions(options: [String], combination: Combination) {
        run(combination, seed: 3, options: options)
    }

    @Test(
        "So does one whose structure changes, with writes kept back or past the page cache",
        arguments: [["--writeback", "on"], ["--direct"]],
        [
            Combination(clusterSize: 4096, hasSnapshots: true),
            Combination(clusterSize: 65536, content: .zeroClusters, dataFile: .raw),
            Combination(
                clusterSize: 65536, content: .longerRawBacking, isExtended: true,
                encryption: .aes, hasSnapshots: true),
        ])
    func equalsModelWhileStructureChangesWithOptions(
        options: [String], combination: Combination
    ) {
        run(combination, seed: 6, changesStructure: true, options: options)
    }

    @Test(
        "So does an encrypted one, past the page cache or with writes kept back",
        arguments: [["--direct"], ["--writeback", "on"]])
    func equalsModelEncryptedWithOptions(options: [String]) {
        let combination = Combination(
            clusterSize: 65536, content: .encryptedBacking, encryption: .aes)
        run(combination, seed: 38, options: options)
    }

    // MARK: What there is not

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
        for list in [
            Combination.extended, Combination.withDataFile, Combination.encrypted,
            Combination.withBitmaps, Combination.changing,
        ] {
            #expect(list.compactMap(\.exclusion) == [])
            #expect(Set(list).count == list.count, "one of them comes twice")
        }
    }

    @Test(
        "QEMU refuses what the random runs leave out",
        arguments: [
            Combination(clusterSize: 4096, version: 2, refcountBits: 8),
            Combination(clusterSize: 4096, version: 2, content: .zstd),
            Combination(clusterSize: 65536, version: 2, isExtended: true),
            Combination(clusterSize: 4096, version: 2, dataFile: .plain),
            Combination(clusterSize: 4096, version: 2, hasBitmaps: true),
            Combination(clusterSize: 4096, version: 2, hasLazyRefcounts: true),
            Combination(clusterSize: 4096, isExtended: true),
            Combination(clusterSize: 4096, refcountBits: 1, hasSnapshots: true),
            Combination(clusterSize: 4096, dataFile: .plain, hasSnapshots: true),
            Combination(clusterSize: 65536, content: .zlib, dataFile: .plain, encryption: .aes),
            Combination(clusterSize: 4096, content: .shorterRawBacking, dataFile: .raw),
        ])
    func qemuAgrees(_ combination: Combination) throws {
        #expect(combination.exclusion != nil)
        let folder = try TemporaryDirectory()
        #expect(throws: Command.Failure.self) { try combination.prepare(in: folder, seed: 1) }
    }

    @Test("So does the program, where it is asked for another size or a snapshot of such an image")
    func programAgrees() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try QemuImg.create(image, size: 1.MiB, options: ["data_file=\(folder.file("data"))"])
        expectRefusal(try qcowfs("snapshot", "-c", "a", image), naming: "data file")
        try makeImage(image, size: 1.MiB, options: ["compat=0.10"], commands: [])
        try QemuImg.snapshot(image, create: "a")
        expectRefusal(try qcowfs("resize", image, "2M"), naming: "version 2", "snapshots")
    }
}
