import TestSupport
import Testing

/// The random runs of plain images, with two bitmaps in each: they mark what was changed, and
/// nothing else.
@Suite("Random run with bitmaps", .serialized)
struct BitmapRandomRunTests {
    @Test(
        "Bitmaps mark exactly what several threads changed", .enabledWhereMountable,
        arguments: [512, 4096, 65536, 2 << 20], [Combination.Content.plain, .qcow2Backing, .zlib])
    func marksChanges(clusterSize: Int, content: Combination.Content) throws {
        let combination = Combination(
            clusterSize: clusterSize, version: 3, refcountBits: 16, content: content)
        let seed = TestEnvironment.seed + 3
        let log = ChangeLog()
        var run = RandomRun(combination: combination, seed: seed)
        run.changes = log
        run.prepare = { image in
            try Command.require("qemu-img", "bitmap", "--add", "-g", "512", image, "fine")
            try Command.require("qemu-img", "bitmap", "--add", "-g", "64k", image, "coarse")
        }
        run.tamper = { image in
            for (name, granularity) in [("fine", 512), ("coarse", 65536)] {
                let expected = FixtureTests.joined(
                    log.granules(of: granularity).map {
                        $0 * granularity..<min(($0 + 1) * granularity, combination.byteCount)
                    })
                guard try BitmapTests.marked(name, of: image) == expected else {
                    throw RandomRun.Difference(description: "'\(name)' marks something else")
                }
                // QEMU believes it, and keeps it.
                try Command.require(
                    "qemu-img", "bitmap", "--add", "--merge", name, "-g", "\(granularity)", image,
                    "copy")
                guard try BitmapTests.marked("copy", of: image) == expected else {
                    throw RandomRun.Difference(description: "QEMU finds another '\(name)'")
                }
                try Command.require("qemu-img", "bitmap", "--remove", image, "copy")
            }
            let info = try Command.require("qemu-img", "info", image)
            guard !info.contains("in-use"), info.contains("coarse") else {
                throw RandomRun.Difference(description: info)
            }
        }
        do { try run.run() } catch {
            Issue.record("\(combination.testDescription), seed \(seed): \(error)")
        }
    }
}
