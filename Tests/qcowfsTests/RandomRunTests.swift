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
