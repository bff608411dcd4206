import Glibc
import TestSupport

extension Combination {
    static let passphrase = "open sesame"
    static let passphraseBelow = "another"

    /// The image of this combination, what its disk holds, what its snapshots hold, and what its
    /// bitmaps mark.
    struct Prepared {
        var image: EncryptedImage
        var model: ReferenceDisk
        var snapshots: [String: ReferenceDisk] = [:]
        var bitmaps: [BitmapModel] = []
    }

    /// Makes the image with QEMU's tools.
    func prepare(in folder: TemporaryDirectory, seed: UInt64) throws -> Prepared {
        var random = RepeatableRandom(seed: seed)
        let image = try makeImage(in: folder, &random)
        var snapshots: [String: ReferenceDisk] = [:]
        for name in hasSnapshots ? ["first", "second", "third"] : [] {
            try image.snapshot("-c", name)
            snapshots[name] = try image.disk(in: folder)
            try write(to: image, writes(&random, 3))
        }
        let bitmaps = hasBitmaps ? try makeBitmaps(in: image, &random) : []
        return Prepared(
            image: image, model: try image.disk(in: folder), snapshots: snapshots,
            bitmaps: bitmaps)
    }

    // MARK: The image

    private func makeImage(
        in folder: TemporaryDirectory, _ random: inout RepeatableRandom
    ) throws -> EncryptedImage {
        var image = EncryptedImage(folder.file("disk.qcow2"), passphrase: Self.passphrase)
        image.isEncrypted = encryption != nil
        if content == .encryptedBacking {
            image.encryptedBelow = [("backing", Self.passphraseBelow, "luks")]
        }
        let backing = try makeBacking(in: folder, &random)
        if content.isCompressed, encryption == nil {
            try convertCompressed(to: image.path, in: folder, &random)
            return image
        }
        try image.create(
            size: byteCount, encryption: encryptionOptions, options: topOptions(in: folder),
            backing: backing?.name, backingFormat: backing?.format ?? "qcow2")
        if content.isCompressed {
            // QEMU writes compressed clusters in clear, here too.
            try image.io(
                (0..<6).map { "write -q -c -P \($0 + 1) \($0 * clusterSize) \(clusterSize)" })
        }
        try write(to: image, writes(&random))
        if content == .zeroClusters { try image.io(zeroes(&random)) }
        return image
    }

    private var options: [String] {
        [
            "cluster_size=\(clusterSize)", "compat=\(version == 2 ? "0.10" : "1.1")",
            "refcount_bits=\(refcountBits)",
        ] + (content == .zstd ? ["compression_type=zstd"] : [])
            + (isExtended ? ["extended_l2=on"] : [])
    }

    /// Options of the top layer: those of all, and its own.
    private func topOptions(in folder: TemporaryDirectory) -> [String] {
        options + (isPreallocated ? ["preallocation=metadata"] : [])
            + (hasLazyRefcounts ? ["lazy_refcounts=on"] : [])
            + (dataFile == nil ? [] : ["data_file=\(dataFileName(in: folder))"])
            + (dataFile == .raw ? ["data_file_raw=on"] : [])
    }

    func dataFileName(in folder: TemporaryDirectory) -> String { folder.file("disk.data") }

    private var encryptionOptions: [String] {
        guard encryption == .twofish else { return [] }
        return [
            "cipher-alg=twofish-256", "cipher-mode=cbc", "ivgen-alg=essiv",
            "ivgen-hash-alg=sha256",
        ]
    }

    private func convertCompressed(
        to path: String, in folder: TemporaryDirectory, _ random: inout RepeatableRandom
    ) throws {
        let disk = ReferenceDisk(byteCount: byteCount)
        for _ in 0..<60 { disk.scribble(&random, upTo: clusterSize * 3) }
        let raw = folder.file("source.raw")
        try disk.save(to: raw)
        try QemuImg.convert(raw, to: path, flags: ["-c", "-o", options.joined(separator: ",")])
    }

    // MARK: What lies below

    private func makeBacking(
        in folder: TemporaryDirectory, _ random: inout RepeatableRandom
    ) throws -> (name: String, format: String)? {
        switch content {
        case .shorterRawBacking:
            return try makeRaw(byteCount * 5 / 8 / 512 * 512 + 100, in: folder, &random)
        case .longerRawBacking: return try makeRaw(byteCount + 3.MiB, in: folder, &random)
        case .qcow2Backing: return try makeChain(of: 1, in: folder, &random)
        case .chainOfFive: return try makeChain(of: 4, in: folder, &random)
        case .encryptedBacking:
            let size = byteCount * 5 / 8 / 512 * 512
            let base = EncryptedImage(
                folder.file("base.qcow2"), passphrase: Self.passphraseBelow)
            try base.create(size: size)
            try write(to: base, writes(&random, in: size))
            return ("base.qcow2", "qcow2")
        default: return nil
        }
    }

    private func makeRaw(
        _ size: Int, in folder: TemporaryDirectory, _ random: inout RepeatableRandom
    ) throws -> (name: String, format: String) {
        let disk = ReferenceDisk(byteCount: size)
        for _ in 0..<40 { disk.scribble(&random, upTo: clusterSize * 2) }
        try disk.save(to: folder.file("base.raw"))
        return ("base.raw", "raw")
    }

    /// A chain of qcow2 files, lowest layer first; they differ in size.
    private func makeChain(
        of count: Int, in folder: TemporaryDirectory, _ random: inout RepeatableRandom
    ) throws -> (name: String, format: String) {
        var below: String?
        for index in 0..<count {
            // Every other layer is shorter, so that reads run past a layer's end.
            let size = index % 2 == 0 ? byteCount : byteCount * 3 / 4 / 512 * 512
            let name = "base\(index).qcow2"
            try QemuImg.create(
                folder.file(name), size: size,
                options: index % 2 == 1 ? options : ["cluster_size=4096"], backing: below)
            try QemuImg.io(folder.file(name), writes(&random, in: size).map(\.command))
            below = name
        }
        return (below ?? "", "qcow2")
    }

    // MARK: What is written

    /// A write of one byte again and again.
    struct Write {
        let range: Range<Int>
        let byte: UInt8
        var command: String { "write -q -P \(byte) \(range.lowerBound) \(range.count)" }
    }

    func writes(
        _ random: inout RepeatableRandom, _ count: Int = 8, in size: Int? = nil
    ) -> [Write] {
        (0..<count).map { _ in
            Write(
                range: place(&random, in: size ?? byteCount),
                byte: UInt8(1 + random.number(below: 255)))
        }
    }

    private func write(to image: EncryptedImage, _ writes: [Write]) throws {
        try image.io(writes.map(\.command))
    }

    private func zeroes(_ random: inout RepeatableRandom) -> [String] {
        (0..<10).map { index in
            let range = place(&random, in: byteCount)
            return "write -q -z \(index % 2 == 0 ? "-u " : "")\(range.lowerBound) \(range.count)"
        }
    }

    private func place(_ random: inout RepeatableRandom, in size: Int) -> Range<Int> {
        let most = max(8, min(clusterSize * 3, size / 4) / 512)
        let count = (1 + random.number(below: most)) * 512
        let start = random.number(below: (size - count) / 512 + 1) * 512
        return start..<start + count
    }

    // MARK: Bitmaps

    /// Makes bitmaps with something in each, of which the last one records no more.
    private func makeBitmaps(
        in image: EncryptedImage, _ random: inout RepeatableRandom
    ) throws -> [BitmapModel] {
        let bitmaps = [("fine", 512), ("coarse", 65536), ("off", 4096)].map { name, granularity in
            BitmapModel(name, granularity: granularity, diskByteCount: byteCount)
        }
        for bitmap in bitmaps {
            try image.bitmap("--add", "-g", "\(bitmap.granularity)", bitmap.name)
        }
        for isLast in [false, true] {
            if isLast {
                try image.bitmap("--disable", "off")
                bitmaps.last?.disable()
            }
            let writes = writes(&random, 3)
            try write(to: image, writes)
            for bitmap in bitmaps { for write in writes { bitmap.note(write.range) } }
        }
        return bitmaps
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
