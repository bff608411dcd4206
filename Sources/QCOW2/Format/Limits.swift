/// The upper bounds on everything that is read from an image, each with its source.
package enum Limits {
    /// 512 bytes to 2 MiB (QEMU).
    package static let clusterBits: ClosedRange<UInt32> = 9...21
    /// Extended L2 entries need subclusters of at least 512 bytes (specification).
    package static let clusterBitsWithExtendedL2: ClosedRange<UInt32> = 14...21
    /// Refcounts are 1 to 64 bits wide (specification).
    package static let refcountOrder: ClosedRange<UInt32> = 0...6
    /// Bytes of the active or a snapshot's L1 table (QEMU).
    package static let l1ByteCount: UInt64 = 32 << 20
    /// Bytes of the refcount table (QEMU).
    package static let refcountTableByteCount: UInt64 = 8 << 20
    /// Host offsets have 56 bits (specification).
    package static let hostOffset: UInt64 = 1 << 56
    /// Bytes of a virtual disk: what an `off_t` can say, less a cluster (QEMU).
    package static let virtualByteCount: UInt64 = UInt64(Int64.max) - 1 << 21
    /// Bytes of a backing file's name (specification).
    package static let backingNameByteCount: UInt64 = 1023
    /// Bytes of a backing format's name (QEMU).
    package static let backingFormatByteCount = 15
    /// Snapshots of an image (QEMU).
    package static let snapshotCount: UInt64 = 65536
    /// Bytes of the snapshot table (QEMU).
    package static let snapshotTableByteCount: UInt64 = 64 << 20
    /// Bytes of a snapshot's extra data (QEMU).
    package static let snapshotExtraByteCount: UInt64 = 1024
    /// Bytes of the name of a new snapshot: QEMU knows no longer ones apart.
    package static let newSnapshotNameByteCount = 255
    /// Bitmaps of an image (QEMU).
    package static let bitmapCount: UInt64 = 65535
    /// Bytes of the bitmap directory (QEMU).
    package static let bitmapDirectoryByteCount: UInt64 = 64 << 20 - 1 << 10
    /// Bytes of a bitmap's name (specification).
    package static let bitmapNameByteCount: UInt64 = 1023
    /// Powers of two of a bitmap's granularity in bytes (QEMU).
    package static let bitmapGranularityBits: ClosedRange<UInt8> = 9...31
    /// Bytes of a bitmap's data, a cluster for each entry of its table (QEMU).
    package static let bitmapByteCount: UInt64 = 512 << 20
    /// Granules of the disk that a bitmap is made for (QEMU).
    package static let newBitmapGranuleCount: UInt64 = 512 << 20
    /// Bytes of the LUKS header with all key material (us; QEMU makes 2 MiB of it).
    package static let luksAreaByteCount: UInt64 = 32 << 20
    /// Stripes of a key slot: the only number in use (QEMU).
    package static let luksStripes: UInt32 = 4000
    /// Seconds that one key slot's PBKDF2 may take on this machine (us; QEMU aims at 2).
    package static let keyDerivationSeconds: Double = 10
    /// Bytes of a passphrase (what cryptsetup takes from a file).
    package static let passphraseByteCount = 8 << 20
    /// Files of a backing chain (us; QEMU stops when it runs out of descriptors).
    package static let chainDepth = 200
}
