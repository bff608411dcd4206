import TestSupport
import Testing

/// What verbs do to chains of images of every kind, beside qemu-img.
@Suite("Verbs on random chains", .needsQemuImg)
struct RandomVerbTests {
    enum Verb: String, CaseIterable, Sendable {
        case convert, compress, commit, rebase, discard, compact, shrink, grow, snapshot, amend
        case measure, write, digest
    }

    @Test("What a verb makes of any chain is what qemu-img says", arguments: Verb.allCases)
    func anyChain(verb: Verb) throws {
        let seed = TestEnvironment.seed
        for round in 0..<(TestEnvironment.isLong ? 200 : 12) as Range<UInt64> {
            var random = RepeatableRandom(seed: seed &* 1000 &+ round)
            let chain = try RandomChain(&random)
            do { try run(verb, chain, &random) } catch {
                Issue.record("\(verb), seed \(seed), round \(round), \(chain.kinds): \(error)")
            }
        }
    }

    private struct Wrong: Error, CustomStringConvertible { let description: String }

    private func require(_ isFine: Bool, _ words: @autoclosure () -> String) throws {
        if !isFine { throw Wrong(description: words()) }
    }

    private func qcowfs(_ words: [String]) throws {
        let result = try Command.run([TestEnvironment.program] + words)
        try require(result.status == 0, "\(result)")
    }

    /// The image holds what `raw` holds, and is clean.
    private func requireSame(_ raw: String, _ image: String) throws {
        let difference = try QemuImg.difference(raw, image)
        try require(difference == nil, difference ?? "")
        let check = try QemuImg.check(image)
        try require(check.status == 0, "\(check)")
    }

    private func run(_ verb: Verb, _ chain: RandomChain, _ random: inout RepeatableRandom) throws {
        let before = try chain.disk()
        let copy = chain.folder.file("copy.qcow2")
        switch verb {
        case .convert, .compress:
            let flags = verb == .compress ? ["-c"] : []
            var kind = RandomChain.kind(&random, dataFile: nil)
            if verb == .compress { kind.removeAll { $0.hasPrefix("refcount") } }
            try qcowfs(
                ["convert", "-O", "qcow2", "-o", kind.joined(separator: ",")] + flags
                    + [chain.top, copy])
            try requireSame(before, copy)
            try qcowfs(["convert", chain.top, chain.folder.file("copy.raw")])
            try requireSame(chain.folder.file("copy.raw"), chain.top)
        case .commit: try commit(chain, before)
        case .rebase: try rebase(chain, before, &random)
        case .discard, .compact:
            try qcowfs([verb.rawValue, chain.top])
            try requireSame(before, chain.top)
        case .shrink, .grow: try resize(chain, before, &random, grows: verb == .grow)
        case .snapshot: try snapshot(chain, before, &random)
        case .amend:
            let options = ["compat=1.1", "lazy_refcounts=on", "refcount_bits=64"]
            let option = options[random.number(below: options.count)]
            // Not every kind can; none changes its disk.
            _ = try Command.run([TestEnvironment.program, "amend", "-o", option, chain.top])
            try requireSame(before, chain.top)
        case .measure: try measure(chain, &random)
        case .write: try write(chain, before, &random)
        case .digest:
            let sum = try Command.require(TestEnvironment.program, "sha256", chain.top)
            let expected = try Command.require("sha256sum", before)
            try require(sum.prefix(64) == expected.prefix(64), sum)
        }
    }

    private func commit(_ chain: RandomChain, _ before: String) throws {
        guard chain.kinds.count > 1 else { return }
        try qcowfs(["commit", chain.top])
        try requireSame(before, chain.top)
        let depth = chain.kinds.count - 2
        let base = chain.folder.file(chain.kinds[depth] == "raw" ? "0.raw" : "\(depth).qcow2")
        // The base may be longer than the overlay, which is all that is committed.
        let size = try TestFile(before, 0).byteCount()
        let part = chain.folder.file("part.raw")
        let format = base.hasSuffix("raw") ? "raw" : "qcow2"
        try QemuImg.convert(base, to: part, from: format, format: "raw")
        try Command.require("truncate", "-s", "\(size)", part)
        try Command.require("cmp", part, before)
        if format == "qcow2" { try require(try QemuImg.check(base).status == 0, "\(base)") }
    }

    private func rebase(
        _ chain: RandomChain, _ before: String, _ random: inout RepeatableRandom
    ) throws {
        let other = chain.folder.file("other.qcow2")
        let size = RandomChain.size(&random)
        try QemuImg.create(
            other, size: size, options: RandomChain.kind(&random, dataFile: other + ".data"))
        try QemuImg.io(other, RandomChain.changes(&random, 8, size: size))
        for backing in [other, ""] {
            try qcowfs(["rebase", "-b", backing, chain.top])
            try requireSame(before, chain.top)
        }
    }

    private func resize(
        _ chain: RandomChain, _ before: String, _ random: inout RepeatableRandom, grows: Bool
    ) throws {
        let sectors = chain.size / 512
        let change = 1 + random.number(below: grows ? 3000 : sectors)
        let size = (grows ? sectors + change : sectors - change) * 512
        try qcowfs(["resize", "--shrink", chain.top, "\(size)"])
        try Command.require("truncate", "-s", "\(size)", before)
        try requireSame(before, chain.top)
    }

    private func snapshot(
        _ chain: RandomChain, _ before: String, _ random: inout RepeatableRandom
    ) throws {
        let words = chain.kinds.last ?? ""
        guard !words.contains("data_file"), !words.contains("refcount_bits=1,"),
            !words.hasSuffix("refcount_bits=1")
        else { return }
        try qcowfs(["snapshot", "-c", "kept", chain.top])
        try QemuImg.io(chain.top, RandomChain.changes(&random, 6, size: chain.size))
        let kept = chain.folder.file("kept.raw")
        try QemuImg.convert(
            chain.top, to: kept, from: "qcow2", format: "raw", flags: ["-l", "snapshot.name=kept"])
        try Command.require("cmp", kept, before)
        if random.chance(oneIn: 2) { try qcowfs(["snapshot", "-a", "kept", chain.top]) }
        let now = try chain.disk(named: "now.raw")
        try qcowfs(["snapshot", "-d", "kept", chain.top])
        try requireSame(now, chain.top)
    }

    private func measure(_ chain: RandomChain, _ random: inout RepeatableRandom) throws {
        let kind = RandomChain.kind(&random, dataFile: nil).joined(separator: ",")
        let words = ["measure", "-O", "qcow2", "-o", kind]
        let ours = try Command.require([TestEnvironment.program] + words + [chain.top])
        let theirs = try Command.require(["qemu-img"] + words + ["-f", "qcow2", chain.top])
        try require(ours == theirs, "\(kind): \(ours)\(theirs)")
    }

    private func write(
        _ chain: RandomChain, _ before: String, _ random: inout RepeatableRandom
    ) throws {
        for _ in 0..<4 {
            let start = random.number(below: chain.size)
            let count = min(1 + random.number(below: 40000), chain.size - start)
            let bytes = [UInt8](repeating: UInt8(random.number(below: 256)), count: count)
            let input = try chain.folder.write(bytes, to: "input")
            try Command.shell(
                "\(TestEnvironment.program) write --offset \(start) \(chain.top) <\(input)")
            try Command.shell(
                "dd if=\(input) of=\(before) bs=64k seek=\(start) oflag=seek_bytes conv=notrunc"
                    + " status=none")
        }
        try requireSame(before, chain.top)
    }
}
