import TestSupport

/// The images whose snapshots come, go and are applied, and whose disks change their sizes, while
/// the random runs use them.
extension Combination {
    static let changing: [Combination] =
        changingPlain + changingExtended + changingDataFile + changingEncrypted

    private static let changingPlain: [Combination] =
        [512, 4096, 65536].flatMap { clusterSize in
            let plain = Combination(clusterSize: clusterSize, hasSnapshots: true)
            return [(2, 16), (3, 4), (3, 16), (3, 64)].map { version, refcountBits in
                plain.with(\.version, version).with(\.refcountBits, refcountBits)
            } + [
                plain.with(\.hasBitmaps, true),
                plain.with(\.content, .longerRawBacking).with(\.hasBitmaps, true),
            ]
        } + [
            // Without snapshots, version 2 changes its size too.
            Combination(clusterSize: 4096, version: 2),
            Combination(clusterSize: 4096, refcountBits: 1, content: .zlib),
            Combination(clusterSize: 4096, hasLazyRefcounts: true, hasSnapshots: true),
            Combination(clusterSize: 4096, content: .chainOfFive, hasSnapshots: true),
            Combination(clusterSize: 65536, content: .zstd, hasSnapshots: true, hasBitmaps: true),
            Combination(
                clusterSize: 65536, version: 2, content: .shorterRawBacking, hasSnapshots: true),
            Combination(clusterSize: 2 << 20, content: .qcow2Backing, hasSnapshots: true),
        ]

    private static let changingExtended: [Combination] =
        [16384, 65536, 2 << 20].flatMap { clusterSize in
            let plain = Combination(
                clusterSize: clusterSize, isExtended: true, hasSnapshots: true)
            return [
                plain, plain.with(\.hasBitmaps, true),
                plain.with(\.content, .qcow2Backing).with(\.hasBitmaps, true),
                plain.with(\.content, .longerRawBacking),
            ]
        } + [
            Combination(
                clusterSize: 65536, content: .zlib, isExtended: true, hasSnapshots: true),
            Combination(
                clusterSize: 16384, content: .longerRawBacking, isExtended: true,
                isPreallocated: true, hasSnapshots: true, hasBitmaps: true),
        ]

    private static let changingDataFile: [Combination] =
        [4096, 65536].flatMap { clusterSize in
            let zeros = Combination(clusterSize: clusterSize, content: .zeroClusters)
            return DataFile.allCases.flatMap {
                [zeros.with(\.dataFile, $0), zeros.with(\.dataFile, $0).with(\.hasBitmaps, true)]
            } + [zeros.with(\.dataFile, .plain).with(\.content, .longerRawBacking)]
        }
        + DataFile.allCases.map {
            Combination(
                clusterSize: 65536, content: .zeroClusters, isExtended: true, dataFile: $0,
                hasBitmaps: true)
        } + [
            Combination(
                clusterSize: 65536, content: .shorterRawBacking, isExtended: true, dataFile: .plain)
        ]

    private static let changingEncrypted: [Combination] =
        [4096, 65536].flatMap { clusterSize in
            let plain = Combination(clusterSize: clusterSize, encryption: .aes, hasSnapshots: true)
            return [
                plain, plain.with(\.encryption, .twofish),
                plain.with(\.content, .encryptedBacking).with(\.hasBitmaps, true),
                plain.with(\.hasSnapshots, false).with(\.dataFile, .plain),
            ]
        } + [
            Combination(
                clusterSize: 65536, content: .shorterRawBacking, isExtended: true, encryption: .aes,
                hasSnapshots: true, hasBitmaps: true),
            Combination(
                clusterSize: 65536, isExtended: true, dataFile: .raw, encryption: .aes),
            Combination(
                clusterSize: 4096, content: .encryptedBacking, hasSnapshots: true),
        ]
}
