internal import Glibc
internal import QCOW2

/// Bytes that somebody calls an image, used in every way a client could.
///
/// Whatever the bytes are, nothing may trap, hang or write where it must not: an error is a fine
/// answer, a crash is none.
package enum HostileImage {
    /// Guest bytes that one use reads at most, and runs that it looks at.
    private static let readLimit = 4 << 20
    private static let runLimit = 4096

    /// Uses `bytes` as an image; what went wrong, or nil.
    package static func fault(of bytes: [UInt8]) -> String? {
        let device = RecordingDevice(bytes, name: "hostile.qcow2", yielding: false)
        let check = try? ImageCheck(device)
        look(at: device)
        if !keepsHeader(device, bytes) { return "what is dehydrated has lost its header" }
        if device.moments.contains(where: \.changesBytes) {
            return "an image opened read-only was written to"
        }
        // A write where the bytes say so may be far behind their end: this one is sparse.
        let disk = RAMDisk(name: "hostile.qcow2")
        try? bytes.withUnsafeBytes { try disk.write($0, at: 0) }
        let fault = change(disk, seed: UInt64(bytes.count))
        // Where counts are lower than they must be, clusters are shared that nobody can know of.
        return check?.corruptionCount == 0 ? fault : nil
    }

    /// Whether the fixed part of the header comes back from the metadata.
    private static func keepsHeader(_ device: RecordingDevice, _ bytes: [UInt8]) -> Bool {
        let (skeleton, again) = (RAMDisk(), RAMDisk())
        guard (try? Dehydration().run(device, to: skeleton)) != nil else { return true }
        try? Rehydration.run(skeleton, to: again)
        var start = [UInt8](repeating: 0, count: min(72, bytes.count))
        _ = try? start.withUnsafeMutableBytes { try again.read(into: $0, at: 0) }
        return start.elementsEqual(bytes.prefix(72))
    }

    /// Reads what there is to read.
    private static func look(at device: RecordingDevice) {
        guard let image = try? Image.open(device, options: .readOnly) else { return }
        defer { try? image.close() }
        read(image)
        for snapshot in (try? image.snapshots()) ?? [] {
            guard let view = try? image.openSnapshot(snapshot) else { continue }
            read(view)
            try? view.close()
        }
        var runs = 0
        try? image.forEachMappedExtent(in: 0..<image.size) { _ throws(ImageError) in
            runs += 1
            if runs > runLimit { throw ImageError(.readOnly, file: "enough") }
        }
    }

    /// Reads data where there is some, and a little around the ends.
    private static func read(_ image: Image) {
        let piece = UnsafeMutableRawBufferPointer.allocate(byteCount: 64 << 10, alignment: 16)
        defer { piece.deallocate() }
        var offset: UInt64 = 0
        var done = 0
        while done < readLimit, offset < image.size {
            let count = Int(min(UInt64(piece.count), image.size - offset))
            try? image.read(
                into: UnsafeMutableRawBufferPointer(rebasing: piece[..<count]), at: offset)
            done += count
            // Damaged entries end the search, not the reading.
            let next = offset + UInt64(count)
            offset = (try? image.seekData(from: next) ?? image.size) ?? next
        }
        if image.size > 0 { _ = try? image.read(at: image.size - 1, count: 1) }
    }

    /// Writes, discards, makes and deletes a snapshot, changes the size, closes; then what was
    /// written reads back.
    private static func change(_ disk: RAMDisk, seed: UInt64) -> String? {
        guard let image = try? Image.open(disk) else { return nil }
        var random = RepeatableRandom(seed: seed)
        var written: [(offset: Int, value: UInt8)] = []
        for round in 0..<12 where image.size >= 4096 {
            let bound = Int(min(image.size - 4095, 1 << 40))
            let offset = round % 2 == 0 ? round * 512 % bound : random.number(below: bound)
            let value = UInt8(round + 1)
            written.removeAll { abs($0.offset - offset) < 4096 }
            if (try? image.write([UInt8](repeating: value, count: 4096), at: offset)) != nil {
                written.append((offset, value))
            }
            switch round {
            case 5: _ = try? image.createSnapshot("fuzz")
            case 7: try? image.flush()
            case 9: try? image.deleteSnapshot("fuzz")
            default: break
            }
        }
        let fault = written.lazy.compactMap { self.fault(of: image, at: $0.offset, $0.value) }.first
        try? image.discard(0..<min(image.size, 8192))
        try? image.resize(to: image.size &+ 65536)
        try? image.close()
        return fault
    }

    /// Whether 4096 bytes that a write took are there; the image may have been given up since.
    private static func fault(of image: Image, at offset: Int, _ value: UInt8) -> String? {
        guard let bytes = try? image.bytes(offset..<offset + 4096) else { return nil }
        return bytes.allSatisfy { $0 == value }
            ? nil : "what was written at \(offset) reads as something else"
    }
}

// MARK: Bytes to begin with

extension HostileImage {
    /// Small images of every kind that needs no other file.
    package static let seeds: [[UInt8]] = [
        seed(ImageBuilder(byteCount: 64.KiB, clusterBits: 9)),
        seed(ImageBuilder(byteCount: 64.KiB, version: 2, clusterBits: 9)),
        seed(ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: 0)),
        seed(ImageBuilder(byteCount: 64.KiB, clusterBits: 9, refcountOrder: 6), snapshots: 3),
        seed(ImageBuilder(byteCount: 256.KiB, clusterBits: 12), snapshots: 1, hasBitmaps: true),
        seed(ImageBuilder(byteCount: 256.KiB, clusterBits: 12, refcountOrder: 3), compresses: true),
        seed(ImageBuilder(byteCount: 64.KiB, clusterBits: 9), snapshots: 1, compresses: true),
        seed(ImageBuilder(byteCount: 512.KiB, clusterBits: 14, isExtended: true), snapshots: 1),
    ]

    private static func seed(
        _ empty: ImageBuilder, snapshots: Int = 0, hasBitmaps: Bool = false,
        compresses: Bool = false
    ) -> [UInt8] {
        var builder = empty
        for cluster in stride(from: 0, to: builder.guestClusterCount, by: 3) {
            let bytes = [UInt8](repeating: UInt8(cluster & 255), count: builder.clusterSize)
            if compresses, cluster % 2 == 0 {
                builder.compress(bytes, guestCluster: cluster)
            } else {
                builder.write(bytes, guestCluster: cluster)
            }
        }
        if builder.version == 3 { builder.zero(guestCluster: 1) }
        for number in 0..<snapshots { builder.snapshot("s\(number)") }
        if hasBitmaps {
            builder.bitmap("dirty", granularityBits: 12, bits: [0x0f])
            builder.bitmap("fine", granularityBits: 9)
        }
        return builder.build()
    }

    /// A seed with some of its bytes changed, most of them where tables are.
    package static func mutant(_ random: inout RepeatableRandom) -> [UInt8] {
        var bytes = seeds[random.number(below: seeds.count)]
        for _ in 0..<1 + random.number(below: 4) { damage(&bytes, &random) }
        return bytes
    }

    private static func damage(_ bytes: inout [UInt8], _ random: inout RepeatableRandom) {
        // The header, any byte, or a word of a table that holds something.
        switch random.number(below: 8) {
        case 0:
            bytes[random.number(below: min(bytes.count, 128))] = UInt8(random.number(below: 256))
        case 1: bytes[random.number(below: bytes.count)] ^= 1 << UInt8(random.number(below: 8))
        case 2: bytes.removeLast(random.number(below: bytes.count - 128))
        case 3:
            let field = [8, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104]
            bytes.put(interesting(bytes.count, &random), at: field[random.number(below: 16)])
        default:
            let word = usedWord(of: bytes, &random)
            bytes.put(interesting(bytes.count, &random), at: word)
        }
    }

    /// Where an aligned word lies that is not zero, if one is found soon.
    private static func usedWord(of bytes: [UInt8], _ random: inout RepeatableRandom) -> Int {
        var word = 0
        for _ in 0..<16 {
            word = random.number(below: bytes.count / 8) * 8
            if bytes[word..<word + 8].contains(where: { $0 != 0 }) { break }
        }
        return word
    }

    /// A number that tables hold, or that programs stumble over.
    private static func interesting(_ byteCount: Int, _ random: inout RepeatableRandom) -> UInt64 {
        let place = UInt64(random.number(below: byteCount + 4096)) & ~511
        switch random.number(below: 9) {
        case 0: return 0
        case 1: return .max
        case 2: return 1 << UInt64(random.number(below: 64))
        case 3: return (1 << UInt64(random.number(below: 64))) &- 1
        case 4: return place
        case 5: return place | 1 << 63
        case 6: return place | 1 << 62
        case 7: return random.next()
        default: return UInt64(random.number(below: 1 << 20)) << 32
        }
    }
}

extension RecordingDevice.Moment {
    fileprivate var changesBytes: Bool {
        switch self {
        case .write, .resize: true
        default: false
        }
    }
}
