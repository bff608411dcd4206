/// Header field `incompatible_features`: who does not know a bit must not open the image.
public struct IncompatibleFeatures: OptionSet, Sendable, Hashable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }

    /// Refcounts may be too low: repair before writing.
    public static let dirty = Self(rawValue: 1 << 0)
    /// Damage was met: do not write.
    public static let corrupt = Self(rawValue: 1 << 1)
    /// Guest data lies in an external data file.
    public static let externalDataFile = Self(rawValue: 1 << 2)
    /// The header's compression type is not deflate.
    public static let compressionType = Self(rawValue: 1 << 3)
    /// L2 entries have 16 bytes and describe 32 subclusters.
    public static let extendedL2 = Self(rawValue: 1 << 4)

    static let known: Self = [.dirty, .corrupt, .externalDataFile, .compressionType, .extendedL2]
}

/// Header field `compatible_features`: unknown bits are kept and ignored.
public struct CompatibleFeatures: OptionSet, Sendable, Hashable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }

    /// Refcounts may be written late, under the dirty bit.
    public static let lazyRefcounts = Self(rawValue: 1 << 0)
}

/// Header field `autoclear_features`: a writer clears the bits it does not know.
public struct AutoclearFeatures: OptionSet, Sendable, Hashable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }

    /// The bitmaps extension is consistent with the image.
    public static let bitmaps = Self(rawValue: 1 << 0)
    /// The external data file alone is a valid raw image.
    public static let rawExternalData = Self(rawValue: 1 << 1)

    static let known: Self = [.bitmaps, .rawExternalData]
}

/// Header field `compression_type`.
public enum CompressionType: UInt8, Sendable {
    /// Raw deflate (RFC 1951) with a window of 4 KiB.
    case deflate = 0
    /// Zstandard (RFC 8878), whose frames may have any window.
    case zstd = 1
}
