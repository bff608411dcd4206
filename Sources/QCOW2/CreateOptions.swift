/// What a new image is like; every part has the default that qemu-img has.
public struct CreateOptions: Sendable {
    /// The version of the format, by its name in `qemu-img create -o compat=`.
    public enum Version: Sendable {
        /// `compat=0.10`: can be read by anything.
        case v2
        /// `compat=1.1`.
        case v3
    }

    /// How much space a new image takes at once.
    public enum Preallocation: String, Sendable {
        /// Nothing but the header and the first tables.
        case off
        /// All tables; the data is a hole in the file.
        case metadata
        /// All tables, and space reserved for the data.
        case falloc
        /// All tables, and zeros written for the data.
        case full
    }

    /// Version 3 where nothing else is said.
    public var version: Version = .v3
    /// A power of two from 512 bytes to 2 MiB.
    public var clusterByteCount: UInt64 = 65536
    /// A power of two from 1 to 64; 16 in version 2.
    public var refcountBits: UInt64 = 16
    /// Lets other programs write reference counts late.  Needs version 3.
    public var hasLazyRefcounts = false
    /// Anything but deflate needs version 3.
    public var compressionType: CompressionType = .deflate
    /// Stored as it is, and found relative to the image.
    public var backingFile: String?
    /// `raw` or `qcow2`; needed with a backing file.
    public var backingFormat: String?
    /// Whether the backing file is looked at, for its existence and its size.
    public var opensBackingFile = true
    /// What takes space before it is written.
    public var preallocation: Preallocation = .off

    /// L2 entries with 32 subclusters each; needs version 3 and clusters of 16 KiB or more.
    public var hasExtendedL2 = false
    /// The external data file: made with the image, stored as it is, and found relative to the
    /// image.  Needs version 3.
    public var dataFile: String?
    /// Whether the data file alone is a raw image of the disk.
    public var dataFileIsRaw = false
    /// Encrypts guest data with LUKS.
    public var encryption: LUKSOptions?

    /// The options that `qemu-img create` has by default.
    public init() {}
}

extension CreateOptions {
    var l2EntryByteCount: UInt64 { hasExtendedL2 ? 16 : 8 }

    /// Whether every cluster gets an L2 entry at once, as a raw data file needs: its tables must
    /// not say less than the file.
    var mapsClusters: Bool { preallocation != .off || dataFileIsRaw }

    /// Throws where the options make no image, or one that this version cannot make.
    func check(file: String) throws(ImageError) {
        if let words = contradiction { throw ImageError(.invalidArgument(words), file: file) }
    }

    /// What qemu-img refuses too, in words.
    private var contradiction: String? {
        if clusterByteCount & (clusterByteCount &- 1) != 0
            || !(512...2 << 20).contains(clusterByteCount)
        {
            return "the cluster size must be a power of two from 512 to 2M bytes"
        }
        if refcountBits & (refcountBits &- 1) != 0 || !(1...64).contains(refcountBits) {
            return "the refcount width must be 1, 2, 4, 8, 16, 32 or 64 bits"
        }
        if version == .v2 {
            if refcountBits != 16 { return "refcounts of \(refcountBits) bits need compat=1.1" }
            if hasLazyRefcounts { return "lazy refcounts need compat=1.1" }
            if compressionType != .deflate { return "compression type zstd needs compat=1.1" }
            if hasExtendedL2 { return "extended L2 entries need compat=1.1" }
            if dataFile != nil { return "an external data file needs compat=1.1" }
            // Nothing else could say that encrypted clusters read as zeros.
            if encryption != nil, preallocation != .off {
                return "preallocation of an encrypted image needs compat=1.1"
            }
        }
        if hasExtendedL2,
            clusterByteCount < 1 &<< UInt64(Limits.clusterBitsWithExtendedL2.lowerBound)
        {
            return "extended L2 entries need clusters of 16k or more"
        }
        return encryption?.contradiction ?? dataFileContradiction ?? backingContradiction
    }

    private var dataFileContradiction: String? {
        guard let dataFile else {
            return dataFileIsRaw ? "data_file_raw needs a data file" : nil
        }
        if dataFile.isEmpty || dataFile.utf8.contains(0) {
            return "the data file has no usable name"
        }
        if BackingResolver.hasScheme(dataFile) { return "the data file is not a plain local path" }
        if dataFileIsRaw, backingFile != nil {
            return "a raw data file cannot be combined with a backing file"
        }
        if dataFileIsRaw, encryption != nil {
            return "an encrypted data file is no raw image: leave data_file_raw off"
        }
        return nil
    }

    private var backingContradiction: String? {
        guard let backingFile else {
            return backingFormat == nil ? nil : "a backing format needs a backing file"
        }
        if backingFile.isEmpty || backingFile.utf8.contains(0) {
            return "the backing file has no usable name"
        }
        if UInt64(backingFile.utf8.count) > Limits.backingNameByteCount {
            return "the backing file's name is longer than \(Limits.backingNameByteCount) bytes"
        }
        guard let backingFormat else {
            return "a backing file needs its format: give -F raw or -F qcow2"
        }
        if BackingResolver.Format(rawValue: backingFormat) == nil {
            return "the backing format \(backingFormat) is not supported (raw and qcow2 are)"
        }
        // Without subclusters the clusters would hide the backing file.
        if preallocation != .off, !hasExtendedL2 {
            return "an image with a backing file can be preallocated with extended_l2=on only"
        }
        return nil
    }
}
