import TestSupport

/// A chain of one to three images of random kinds and sizes with random content, made by QEMU in a
/// folder of its own.
struct RandomChain {
    let folder: TemporaryDirectory
    /// The image on top, and the options that each file was made with, the lowest one first.
    private(set) var top = ""
    private(set) var kinds: [String] = []
    private(set) var size = 0

    init(_ random: inout RepeatableRandom) throws {
        folder = try TemporaryDirectory()
        let depth = 1 + random.number(below: 3)
        if depth > 1, random.chance(oneIn: 3) { try makeRaw(&random) }
        while kinds.count < depth { try makeImage(&random) }
    }

    private mutating func makeRaw(_ random: inout RepeatableRandom) throws {
        size = Self.size(&random)
        top = folder.file("0.raw")
        try Command.require("truncate", "-s", "\(size)", top)
        try QemuImg.io(top, Self.changes(&random, 6, size: size), format: "raw")
        kinds.append("raw")
    }

    private mutating func makeImage(_ random: inout RepeatableRandom) throws {
        let path = folder.file("\(kinds.count).qcow2")
        let kind = Self.kind(&random, dataFile: path + ".data")
        size = Self.size(&random)
        try QemuImg.create(
            path, size: size, options: kind, backing: kinds.isEmpty ? nil : top,
            backingFormat: kinds == ["raw"] ? "raw" : "qcow2")
        try QemuImg.io(path, Self.changes(&random, 1 + random.number(below: 9), size: size))
        top = path
        kinds.append(kind.joined(separator: ","))
    }

    /// Options for `qemu-img create -o`.
    static func kind(_ random: inout RepeatableRandom, dataFile: String?) -> [String] {
        func cluster(_ least: Int, _ steps: Int) -> String {
            "cluster_size=\(least << random.number(below: steps))"
        }
        switch random.number(below: dataFile == nil ? 5 : 7) {
        case 0...2: return [cluster(512, 12), "refcount_bits=\(1 << random.number(below: 7))"]
        case 3: return ["compat=0.10", cluster(512, 9)]
        case 4: return ["extended_l2=on", cluster(16384, 4)]
        case 5: return ["data_file=\(dataFile ?? "")", cluster(512, 9)]
        default: return ["data_file=\(dataFile ?? "")", "extended_l2=on", cluster(16384, 4)]
        }
    }

    static func size(_ random: inout RepeatableRandom) -> Int {
        (1 + random.number(below: 1500)) * 512
    }

    /// Writes, zeros and discards for qemu-io.
    static func changes(_ random: inout RepeatableRandom, _ count: Int, size: Int) -> [String] {
        let verbs = [
            "write -q -P 1", "write -q -P 2", "write -q -z", "write -q -z -u", "discard -q",
        ]
        return (0..<count).map { _ in
            let sectors = size / 512
            let start = random.number(below: sectors)
            let length = 1 + random.number(below: [8, 40, 300][random.number(below: 3)])
            let verb = verbs[random.number(below: verbs.count)]
            return "\(verb) \(start * 512) \(min(length, sectors - start) * 512)"
        }
    }

    /// The disk as QEMU reads it, in a new raw file.
    func disk(named name: String = "disk.raw") throws -> String {
        let raw = folder.file(name)
        try QemuImg.convert(top, to: raw, from: "qcow2", format: "raw")
        return raw
    }
}
