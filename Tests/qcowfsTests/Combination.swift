import TestSupport
import Testing

/// One kind of image of the random runs.
struct Combination: Hashable, Sendable, CustomTestStringConvertible {
    enum Content: String, CaseIterable, Sendable {
        case plain = "no backing"
        case qcow2Backing = "qcow2 backing"
        case shorterRawBacking = "shorter raw backing"
        case longerRawBacking = "longer raw backing"
        case encryptedBacking = "encrypted backing"
        case chainOfFive = "chain of 5"
        case zlib = "compressed zlib"
        case zstd = "compressed zstd"
        case zeroClusters = "zero clusters"

        /// Those that every kind of plain image is tried with.
        static let standard: [Content] = [
            .plain, .qcow2Backing, .shorterRawBacking, .chainOfFive, .zlib, .zstd, .zeroClusters,
        ]

        var isCompressed: Bool { self == .zlib || self == .zstd }

        var hasBacking: Bool { !isCompressed && self != .plain && self != .zeroClusters }
    }

    /// Where guest data lies, if not in the image.
    enum DataFile: String, CaseIterable, Sendable { case plain, raw }

    enum Encryption: String, CaseIterable, Sendable {
        /// QEMU's default: AES in XTS.
        case aes
        /// Twofish in CBC with ESSIV.
        case twofish
    }

    let clusterSize: Int
    var version = 3
    var refcountBits = 16
    var hasLazyRefcounts = false
    var content = Content.plain
    /// Whether L2 entries have 32 subclusters.
    var isExtended = false
    /// Whether all clusters have space from the start, in an extended image whatever is below.
    var isPreallocated = false
    var dataFile: DataFile?
    var encryption: Encryption?
    /// Whether there are three internal snapshots from the start.
    var hasSnapshots = false
    /// Whether there are dirty bitmaps: two that record, and a disabled one.
    var hasBitmaps = false

    var testDescription: String {
        ([
            "\(clusterSize) B, v\(version), \(refcountBits)-bit counts, \(content.rawValue)",
            hasLazyRefcounts ? "lazy" : nil, isExtended ? "subclusters" : nil,
            isPreallocated ? "preallocated" : nil,
            dataFile.map { "\($0.rawValue) data file" }, encryption.map { "LUKS \($0.rawValue)" },
            hasSnapshots ? "snapshots" : nil, hasBitmaps ? "bitmaps" : nil,
        ] as [String?]).compactMap { $0 }.joined(separator: ", ")
    }

    /// The same kind of image with another part.
    func with<Part>(_ part: WritableKeyPath<Combination, Part>, _ value: Part) -> Combination {
        var copy = self
        copy[keyPath: part] = value
        return copy
    }

    /// Why there is no such image; nil where there is.
    var exclusion: String? {
        if version == 2 && refcountBits != 16 { return "version 2 has 16-bit counts only" }
        if version == 2 && content == .zstd { return "version 2 has no compression type" }
        if version == 2 && content == .zeroClusters { return "version 2 has no zero flag" }
        if version == 2 && isExtended { return "version 2 has no subclusters" }
        if version == 2 && dataFile != nil { return "version 2 has no data files" }
        if version == 2 && hasLazyRefcounts { return "version 2 has no dirty bit" }
        if version == 2 && hasBitmaps { return "version 2 has no bitmaps" }
        if isExtended && clusterSize < 16384 { return "a subcluster has 512 bytes at least" }
        if refcountBits == 1 && hasSnapshots {
            return "a cluster that a snapshot shares has a count of 2"
        }
        if dataFile != nil && hasSnapshots { return "nobody counts the clusters of a data file" }
        if dataFile != nil && content.isCompressed { return "a data file has whole clusters only" }
        if dataFile == .raw && content.hasBacking { return "a raw data file is the whole disk" }
        return nil
    }

    /// Bytes of the disk: some clusters, and a last one that is not whole where that can be.
    var byteCount: Int {
        switch clusterSize {
        case 512: 640.KiB
        case 4096: 4.MiB + 1536
        case 16384: 8.MiB + 1536
        case 65536: (encryption == nil ? 20.MiB : 12.MiB) + 1536
        default: (encryption == nil ? 40.MiB : 24.MiB) + 1536
        }
    }
}

/// What the random runs go through.
extension Combination {
    /// Plain images of every kind, those that cannot be too.
    static let every: [Combination] = [512, 4096, 65536, 2 << 20].flatMap { clusterSize in
        [2, 3].flatMap { version in
            [1, 8, 16, 64].flatMap { refcountBits in
                let plain = Combination(
                    clusterSize: clusterSize, version: version, refcountBits: refcountBits)
                return Content.standard.map { plain.with(\.content, $0) }
                    + [plain.with(\.hasSnapshots, true)]
            }
        }
    }

    static let allowed = every.filter { $0.exclusion == nil }

    /// Images with subclusters, of every kind, and some with space for all of them.
    static let extended: [Combination] = [16384, 65536, 2 << 20].flatMap { clusterSize in
        let plain = Combination(clusterSize: clusterSize, isExtended: true)
        return (Content.standard + [.longerRawBacking]).map { plain.with(\.content, $0) }
            + [plain.with(\.hasSnapshots, true)]
            + [.plain, .qcow2Backing, .longerRawBacking].map {
                plain.with(\.content, $0).with(\.isPreallocated, true)
            }
    }

    static let withDataFile: [Combination] = [512, 4096, 65536, 2 << 20].flatMap { clusterSize in
        let zeros = Combination(
            clusterSize: clusterSize, content: .zeroClusters, dataFile: .plain)
        return [
            zeros, zeros.with(\.isPreallocated, true), zeros.with(\.dataFile, .raw),
            zeros.with(\.content, .shorterRawBacking),
        ]
    }

    static let encrypted: [Combination] = [4096, 65536, 2 << 20].flatMap { clusterSize in
        let plain = Combination(clusterSize: clusterSize, encryption: .aes)
        return [.plain, .qcow2Backing, .shorterRawBacking, .encryptedBacking, .zlib].map {
            plain.with(\.content, $0)
        } + [
            plain.with(\.content, .encryptedBacking).with(\.encryption, nil),
            plain.with(\.hasSnapshots, true), plain.with(\.dataFile, .plain),
            plain.with(\.encryption, .twofish),
        ]
    }

    static let withBitmaps: [Combination] = [512, 4096, 65536, 2 << 20].flatMap { clusterSize in
        [Content.plain, .qcow2Backing, .zlib].map {
            Combination(clusterSize: clusterSize, content: $0, hasBitmaps: true)
        }
    }
}
