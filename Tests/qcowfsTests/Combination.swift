import TestSupport
import Testing

/// One kind of image of the random runs.
struct Combination: RandomRunSubject, Hashable, CustomTestStringConvertible {
    enum Content: String, CaseIterable, Sendable {
        case plain = "no backing"
        case qcow2Backing = "qcow2 backing"
        case shorterRawBacking = "shorter raw backing"
        case chainOfFive = "chain of 5"
        case zlib = "compressed zlib"
        case zstd = "compressed zstd"
        case snapshots = "with snapshots"
        case zeroClusters = "zero clusters"
        case longerRawBacking = "longer raw backing"

        /// Those that every kind of plain image is tried with.
        static let standard = allCases.filter { $0 != .longerRawBacking }
    }

    let clusterSize: Int
    let version: Int
    let refcountBits: Int
    let content: Content
    /// Whether L2 entries have 32 subclusters.
    var isExtended = false
    /// Whether all clusters have space from the start, in an extended image whatever is below.
    var isPreallocated = false

    var testDescription: String {
        "\(clusterSize) B, v\(version), \(refcountBits)-bit counts, \(content.rawValue)"
            + (isExtended ? ", subclusters" : "") + (isPreallocated ? ", preallocated" : "")
    }

    static let every: [Combination] = [512, 4096, 65536, 2 << 20].flatMap { clusterSize in
        [2, 3].flatMap { version in
            [1, 8, 16, 64].flatMap { refcountBits in
                Content.standard.map {
                    Combination(
                        clusterSize: clusterSize, version: version, refcountBits: refcountBits,
                        content: $0)
                }
            }
        }
    }

    static let allowed = every.filter { $0.exclusion == nil }

    /// Images with subclusters, of every kind, and some with space for all of them.
    static let extended: [Combination] = [16384, 65536, 2 << 20].flatMap { clusterSize in
        Content.allCases.map {
            Combination(
                clusterSize: clusterSize, version: 3, refcountBits: 16, content: $0,
                isExtended: true)
        }
            + [.plain, .qcow2Backing, .longerRawBacking].map {
                Combination(
                    clusterSize: clusterSize, version: 3, refcountBits: 16, content: $0,
                    isExtended: true, isPreallocated: true)
            }
    }

    /// Why the format does not allow this combination; nil where it does.
    var exclusion: String? {
        if version == 2 && refcountBits != 16 { return "version 2 has 16-bit counts only" }
        if version == 2 && content == .zstd { return "version 2 has no compression type" }
        if version == 2 && content == .zeroClusters { return "version 2 has no zero flag" }
        if refcountBits == 1 && content == .snapshots {
            return "a cluster that a snapshot shares has a count of 2"
        }
        return nil
    }

    var options: [String] {
        [
            "cluster_size=\(clusterSize)", "compat=\(version == 2 ? "0.10" : "1.1")",
            "refcount_bits=\(refcountBits)",
        ] + (content == .zstd ? ["compression_type=zstd"] : [])
            + (isExtended ? ["extended_l2=on"] : [])
    }

    /// Options of the top layer only.
    private var topOptions: [String] {
        options + (isPreallocated ? ["preallocation=metadata"] : [])
    }

    /// Bytes of the disk: some clusters, and a last one that is not whole where that can be.
    var byteCount: Int {
        switch clusterSize {
        case 512: 640.KiB
        case 4096: 4.MiB + 1536
        case 16384: 8.MiB + 1536
        case 65536: 20.MiB + 1536
        default: 40.MiB + 1536
        }
    }
}

extension Combination {
    /// The image of this combination, what its disk holds, and what its snapshots hold.
    struct Prepared {
        let image: String
        let model: ReferenceDisk
        let snapshots: [String: ReferenceDisk]
        /// What else must be true of the model and the files at the end.
        var alsoJudge: ((ReferenceDisk) throws -> Void)?
        /// The image as QEMU decrypts it; nil where nothing is encrypted.
        var encrypted: EncryptedImage?
    }

    /// Makes the image with QEMU's tools.
    func prepare(in folder: TemporaryDirectory, seed: UInt64) throws -> Prepared {
        var random = RepeatableRandom(seed: seed)
        let image = folder.file("disk.qcow2")
        var snapshots: [String: ReferenceDisk] = [:]
        switch content {
        case .plain:
            try QemuImg.create(image, size: byteCount, options: topOptions)
            try QemuImg.io(image, writes(&random))
        case .qcow2Backing:
            try overlay(image, over: [folder.file("base.qcow2")], &random)
        case .chainOfFive:
            try overlay(image, over: (1...4).map { folder.file("base\($0).qcow2") }, &random)
        case .shorterRawBacking:
            let shorter = byteCount * 5 / 8 / 512 * 512 + 100
            try overlay(image, overRawOf: shorter, in: folder, &random)
        case .longerRawBacking:
            try overlay(image, overRawOf: byteCount + 3.MiB, in: folder, &random)
        case .zlib, .zstd:
            let disk = ReferenceDisk(byteCount: byteCount)
            for _ in 0..<60 { disk.scribble(&random, upTo: clusterSize * 3) }
            let raw = folder.file("source.raw")
            try disk.save(to: raw)
            try QemuImg.convert(
                raw, to: image, flags: ["-c", "-o", options.joined(separator: ",")])
        case .snapshots:
            try QemuImg.create(image, size: byteCount, options: options)
            for name in ["first", "second"] {
                try QemuImg.io(image, writes(&random))
                try QemuImg.snapshot(image, create: name)
                snapshots[name] = try disk(of: image, in: folder)
            }
            try QemuImg.io(image, writes(&random).suffix(3))
        case .zeroClusters:
            try QemuImg.create(image, size: byteCount, options: options)
            try QemuImg.io(image, writes(&random) + zeroes(&random))
        }
        return Prepared(
            image: image, model: try disk(of: image, in: folder), snapshots: snapshots)
    }

    private func disk(
        of image: String, in folder: TemporaryDirectory
    ) throws -> ReferenceDisk {
        let raw = folder.file("before.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        return try ReferenceDisk(contentsOf: raw)
    }

    private func overlay(
        _ image: String, overRawOf size: Int, in folder: TemporaryDirectory,
        _ random: inout RepeatableRandom
    ) throws {
        let disk = ReferenceDisk(byteCount: size)
        for _ in 0..<40 { disk.scribble(&random, upTo: clusterSize * 2) }
        try disk.save(to: folder.file("base.raw"))
        try QemuImg.create(
            image, size: byteCount, options: topOptions, backing: "base.raw",
            backingFormat: "raw")
        try QemuImg.io(image, writes(&random))
    }

    /// A chain, lowest layer first, with `image` on top; the layers differ in size.
    private func overlay(
        _ image: String, over layers: [String], _ random: inout RepeatableRandom
    ) throws {
        var below: String?
        for (index, layer) in (layers + [image]).enumerated() {
            // Every other layer below is shorter, so that reads run past a layer's end.
            let size = layer == image || index % 2 == 0 ? byteCount : byteCount * 3 / 4 / 512 * 512
            try QemuImg.create(
                layer, size: size,
                options: layer == image
                    ? topOptions : index % 2 == 1 ? options : ["cluster_size=4096"],
                backing: below.map { String($0.split(separator: "/").last!) })
            try QemuImg.io(layer, writes(&random, size: size))
            below = layer
        }
    }

    private func writes(_ random: inout RepeatableRandom, size: Int? = nil) -> [String] {
        (0..<8).map { _ in
            let (offset, count) = place(&random, in: size ?? byteCount)
            return "write -q -P \(1 + random.number(below: 255)) \(offset) \(count)"
        }
    }

    private func zeroes(_ random: inout RepeatableRandom) -> [String] {
        (0..<10).map { index in
            let (offset, count) = place(&random, in: byteCount)
            return "write -q -z \(index % 2 == 0 ? "-u " : "")\(offset) \(count)"
        }
    }

    private func place(_ random: inout RepeatableRandom, in size: Int) -> (Int, Int) {
        let most = max(8, min(clusterSize * 3, size / 4) / 512)
        let count = (1 + random.number(below: most)) * 512
        return (random.number(below: (size - count) / 512 + 1) * 512, count)
    }
}

extension ReferenceDisk {
    /// Fills a random range with one byte.
    func scribble(_ random: inout RepeatableRandom, upTo most: Int) {
        let count = min(1 + random.number(below: most), byteCount)
        let start = random.number(below: byteCount - count + 1)
        self[start..<start + count].initializeMemory(
            as: UInt8.self, repeating: UInt8(1 + random.number(below: 255)))
    }
}
