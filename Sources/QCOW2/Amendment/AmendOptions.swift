/// What shall change of an existing image; nil leaves a thing as it is.
public struct AmendOptions: Sendable {
    /// Version 2 holds less: what it cannot hold is refused, zero clusters are expressed otherwise.
    public var version: CreateOptions.Version?
    /// A power of two from 1 to 64; 16 in version 2.
    public var refcountBits: UInt64?
    /// Whether other programs may write reference counts late.  Needs version 3.
    public var hasLazyRefcounts: Bool?
    /// Stored as it is, and not looked at; empty for none.
    public var backingFile: String?
    /// `raw` or `qcow2`.
    public var backingFormat: String?
    /// Bytes of the virtual disk, a multiple of 512, not less than before.
    public var size: UInt64?
    /// Another name for the external data file of an image that has one.
    public var dataFile: String?
    /// Whether the data file shall alone be a raw image: that can only be given up.
    public var dataFileIsRaw: Bool?

    /// Options that change nothing.
    public init() {}
}

extension AmendOptions {
    /// The header that an image with `old` shall have, as far as it follows from the header alone.
    /// - Throws: `.invalidArgument` where the wishes contradict the format or each other.
    func amended(_ old: Header, file: String) throws(ImageError) -> Header {
        if let words = contradiction(with: old) {
            throw ImageError(.invalidArgument(words), file: file)
        }
        var new = old
        // A writer that does not know a bit cannot keep what it promises.
        new.autoclearFeatures.formIntersection(.known)
        if version == .v3, old.version == 2 { new.becomeVersion3() }
        if let hasLazyRefcounts {
            new.compatibleFeatures.remove(.lazyRefcounts)
            if hasLazyRefcounts { new.compatibleFeatures.insert(.lazyRefcounts) }
        }
        if let refcountBits { new.refcountOrder = UInt32(refcountBits.trailingZeroBitCount) }
        if dataFileIsRaw == false { new.autoclearFeatures.remove(.rawExternalData) }
        if let dataFile { new.set(HeaderExtension.externalDataFile, to: Array(dataFile.utf8)) }
        amendBacking(of: &new)
        if version == .v2 { new.becomeVersion2() }
        return new
    }

    private func amendBacking(of header: inout Header) {
        if let backingFile { header.backingFile = backingFile.isEmpty ? nil : backingFile }
        if header.backingFile == nil {
            header.extensions.removeAll { $0.type == HeaderExtension.backingFormat }
        } else if let backingFormat {
            header.set(HeaderExtension.backingFormat, to: Array(backingFormat.utf8))
        }
    }

    /// What qemu-img refuses too, in words.
    private func contradiction(with old: Header) -> String? {
        let willBeVersion3 = version == .v3 || version == nil && old.version == 3
        if let refcountBits {
            if refcountBits & (refcountBits &- 1) != 0 || !(1...64).contains(refcountBits) {
                return "the refcount width must be 1, 2, 4, 8, 16, 32 or 64 bits"
            }
            if !willBeVersion3, refcountBits != 16 {
                return "refcounts of \(refcountBits) bits need compat=1.1"
            }
        }
        if hasLazyRefcounts == true, !willBeVersion3 { return "lazy refcounts need compat=1.1" }
        return downgradeContradiction(with: old) ?? dataFileContradiction(with: old)
            ?? backingContradiction(with: old)
    }

    private func downgradeContradiction(with old: Header) -> String? {
        guard version == .v2, old.version == 3 else { return nil }
        let wayOut = ", which version 2 (compat=0.10) cannot hold"
        if old.hasDataFile { return "has an external data file" + wayOut }
        if old.incompatibleFeatures.contains(.extendedL2) {
            return "has extended L2 entries" + wayOut
        }
        if old.compressionType != .deflate { return "is compressed with zstd" + wayOut }
        if old.autoclearFeatures.contains(.bitmaps), old.bitmaps != nil {
            return "has bitmaps" + wayOut + ": remove them first, with bitmap --remove"
        }
        if old.encryptionMethod != 0, old.backingFile != nil {
            return "is encrypted over a backing file" + wayOut
        }
        if refcountBits == nil, old.refcountOrder != 4 {
            return "has refcounts of \(old.refcountBits) bits" + wayOut
                + ": give refcount_bits=16 too"
        }
        return nil
    }

    private func dataFileContradiction(with old: Header) -> String? {
        if let dataFile {
            if !old.hasDataFile { return "has no external data file, and cannot get one" }
            if dataFile.isEmpty || dataFile.utf8.contains(0) {
                return "the data file has no usable name"
            }
            if BackingResolver.hasScheme(dataFile) {
                return "the data file is not a plain local path"
            }
        }
        if dataFileIsRaw == true, !old.hasRawDataFile {
            return "data_file_raw cannot be set on an existing image"
        }
        return nil
    }

    private func backingContradiction(with old: Header) -> String? {
        guard backingFile != nil || backingFormat != nil else { return nil }
        let name = backingFile ?? old.backingFile ?? ""
        if name.isEmpty {
            return backingFormat == nil ? nil : "a backing format needs a backing file"
        }
        if name.utf8.contains(0) { return "the backing file has no usable name" }
        if UInt64(name.utf8.count) > Limits.backingNameByteCount {
            return "the backing file's name is longer than \(Limits.backingNameByteCount) bytes"
        }
        if old.hasRawDataFile, dataFileIsRaw != false {
            return "a raw data file cannot be combined with a backing file"
        }
        guard let format = backingFormat ?? old.backingFormat else {
            return "a backing file needs its format: give backing_fmt=raw or backing_fmt=qcow2"
        }
        if BackingResolver.Format(rawValue: format) == nil {
            return "the backing format \(format) is not supported (raw and qcow2 are)"
        }
        return nil
    }
}

extension Header {
    fileprivate mutating func becomeVersion3() {
        version = 3
        byteCount = Header.writtenByteCountV3
        if clusterByteCount > 4096 {
            extensions.removeAll { $0.type == HeaderExtension.featureNames }
            extensions.append(.featureNameTable)
        }
    }

    /// Drops what version 2 has no place for.
    fileprivate mutating func becomeVersion2() {
        version = 2
        byteCount = Header.byteCountV2
        incompatibleFeatures = []
        compatibleFeatures = []
        autoclearFeatures = []
        unknownFields = []
        extensions.removeAll { $0.type == HeaderExtension.featureNames }
    }

    fileprivate mutating func set(_ type: UInt32, to data: [UInt8]) {
        if let index = extensions.firstIndex(where: { $0.type == type }) {
            extensions[index].data = data
        } else {
            extensions.insert(HeaderExtension(type: type, data: data), at: 0)
        }
    }
}
