/// How one byte of a disk is found: file by file, table by table, as the tables on disk say.
///
/// Nothing of it needs the tables to be right: an entry that makes no sense is shown as it is, with
/// the reason, and files that cannot be opened end the way with an obstacle.
public struct Explanation: Sendable {
    /// The guest byte.
    public var offset: UInt64
    /// The files that were asked, the image first; the last one answers.
    public var layers: [Layer] = []
    /// Why the next file of the chain could not be asked; nil where none was needed.
    public var obstacle: String?

    /// What one file of the chain says of the byte.
    public struct Layer: Sendable {
        /// The file.
        public var path: String
        /// What the file is.
        public var format: ImageInfo.Format
        /// Bytes of the file's disk.
        public var virtualByteCount: UInt64
        /// Bytes of a cluster; nil for a raw disk.
        public var clusterByteCount: UInt64?
        /// The entry of the L1 table; nil where there is no such entry.
        public var l1: TableEntry?
        /// The entry of the L2 table; nil where there is no such table.
        public var l2: TableEntry?
        /// The part of the cluster; nil without extended L2 entries.
        public var subcluster: Subcluster?
        /// What the file has there.
        public var answer: Answer
        /// Where the byte lies; nil where it is stored nowhere, or in a stream.
        public var place: Place?
        /// The compressed cluster that the byte is in; nil where it is in none.
        public var stream: Stream?
        /// The host clusters that the L2 entry refers to, with their reference counts.
        public var clusters: [HostCluster] = []
        /// The snapshots with the same L2 table or cluster here.
        public var sharers: [Sharer] = []
        /// How the byte is encrypted; nil where it is not.
        public var encryption: Encryption?
    }

    /// What an answer stands for.
    public enum Answer: Sendable, Equatable {
        /// Bytes of the file.
        case data
        /// Bytes of a compressed stream.
        case compressed
        /// Zeros, without and with a host cluster.
        case zeroPlain, zeroAllocated
        /// Nothing: the next file answers, or there are zeros where there is none.
        case unallocated
        /// The disk ends before the byte: zeros.
        case pastTheEnd
        /// The file system has a hole there: zeros.
        case hole
        /// An entry that cannot be obeyed.
        case corrupt(String)
    }

    /// An entry of an L1 or L2 table.
    public struct TableEntry: Sendable, Equatable {
        /// The entry's number in its table, from 0.
        public var index: UInt64
        /// Host offset of the entry.
        public var place: UInt64
        /// The entry as it is stored, in the host's byte order.
        public var bits: UInt64
        /// What it points to: an L2 table, a cluster or a stream; 0 for nothing.
        public var target: UInt64
        /// Whether the COPIED flag is set: exactly one reference.
        public var isCopied: Bool
        /// Whether the entry describes a compressed stream.
        public var isCompressed = false
        /// Whether the cluster reads as zeros.
        public var hasZeroFlag = false
        /// Bits that should be 0.
        public var reservedBits: UInt64
        /// References to an L2 table; nil where its count cannot be read.
        public var refcount: UInt64?
    }

    /// One of the 32 parts of a cluster, in an image with extended L2 entries.
    public struct Subcluster: Sendable, Equatable {
        /// 0 to 31.
        public var index: Int
        /// A bit for each subcluster that has data, the first one lowest.
        public var allocated: UInt32
        /// A bit for each subcluster that reads as zeros.
        public var zero: UInt32
    }

    /// Where a byte lies.
    public struct Place: Sendable, Equatable {
        /// The image's own file, or its external data file as the header names it.
        public var path: String
        /// Bytes from the start of that file.
        public var offset: UInt64
    }

    /// A compressed cluster.
    public struct Stream: Sendable, Equatable {
        /// Host offset of the stream's first byte.
        public var offset: UInt64
        /// Bytes up to the end of the stream's last sector: the stream may be shorter.
        public var byteCount: Int
        /// Which byte of the cluster that comes out is meant.
        public var position: UInt64
        /// How it is compressed.
        public var type: CompressionType
    }

    /// A host cluster that an entry refers to.
    public struct HostCluster: Sendable, Equatable {
        /// Host offset, a multiple of the cluster size.
        public var offset: UInt64
        /// Nil where the count cannot be read.
        public var refcount: UInt64?
    }

    /// A snapshot that shows the same bytes here.
    public struct Sharer: Sendable, Equatable {
        /// The snapshot's identifier.
        public var id: String
        /// The snapshot's name.
        public var name: String
        /// Whether its L1 table leads to the same L2 table.
        public var sharesTable: Bool
        /// Whether it leads to the same host cluster.
        public var sharesCluster: Bool
    }

    /// How the sector of 512 bytes around the byte is encrypted.
    public struct Encryption: Sendable, Equatable {
        /// Legacy AES, or LUKS.
        public enum Method: String, Sendable {
            /// One key for the file, no header.
            case aes
            /// A LUKS header with key slots.
            case luks
        }

        /// Which of the format's two kinds of encryption it is.
        public var method: Method
        /// What its initialization vector is made of: the sector's number in the file (LUKS) or on
        /// the disk (legacy AES).
        public var sector: UInt64
    }
}

extension Explanation {
    /// Follows the byte at `offset` of the image at `path`.
    ///
    /// - Parameters:
    ///   - path: Where the image is.
    ///   - offset: A byte of the disk.
    ///   - locking: What keeps writers away meanwhile.
    ///   - snapshot: The internal snapshot, by identifier or name, that is meant instead.
    ///   - policy: Which backing files may be asked; one that may not is an obstacle.
    /// - Throws: `.invalidArgument` for an offset outside of the disk, and what opening the image
    ///   throws.
    public init(
        path: String, offset: UInt64, snapshot: String? = nil,
        policy: OpenPolicy = .imageDirectory, locking: OpenOptions.Locking = .required
    ) throws(ImageError) {
        self.offset = offset
        let resolver = try BackingResolver(policy: policy, imagePath: path)
        let device = try Self.open(path, locking)
        defer { device.close() }
        let header = try Header.readSupported(from: device)
        var explainer = try LayerExplainer(device, header, path: path)
        if let snapshot { try explainer.view(snapshot) }
        guard offset < explainer.virtualByteCount else {
            throw ImageError(
                .invalidArgument(
                    "offset \(offset) is outside of the disk "
                        + "(\(explainer.virtualByteCount) bytes)"), file: path)
        }
        layers = [try explainer.explain(offset)]
        var overlay = (header: header, path: path, isProbed: false)
        var chain = [device.identity]
        while let last = layers.last, last.answer == .unallocated,
            let reference = overlay.header.backingFile
        {
            do throws(ImageError) {
                let found = try resolver.resolve(
                    reference, format: overlay.header.backingFormat, from: overlay.path,
                    overlayWasProbed: overlay.isProbed, chain: chain)
                chain.append(found.identity)
                guard let header = try ask(found, locking) else { return }
                overlay = (header, found.location, found.isProbed)
            } catch {
                obstacle = error.description
                return
            }
        }
    }

    /// Asks a backing file; its header tells where to go on, nil where it is a raw disk.
    private mutating func ask(
        _ found: BackingResolver.Resolved, _ locking: OpenOptions.Locking
    ) throws(ImageError) -> Header? {
        let device = try Self.open(found.path, locking)
        defer { device.close() }
        guard found.format == .qcow2 else {
            layers.append(try Layer(raw: device, at: offset))
            return nil
        }
        let header = try Header.readSupported(from: device)
        var explainer = try LayerExplainer(device, header, path: found.location)
        layers.append(try explainer.explain(offset))
        return header
    }

    private static func open(
        _ path: String, _ locking: OpenOptions.Locking
    ) throws(ImageError) -> FileDevice {
        let device = try FileDevice(path: path, access: .readOnly, mapsBytes: false)
        do throws(ImageError) {
            try ImageLock.take(locking == .required ? .reader : .forceShare, on: device)
            return device
        } catch {
            device.close()
            throw error
        }
    }
}

extension Explanation.Layer {
    /// A raw disk, whose bytes are where they are.
    fileprivate init(raw device: FileDevice, at offset: UInt64) throws(ImageError) {
        do throws(SystemError) {
            let byteCount = try device.byteCount()
            self.init(
                path: device.name, format: .raw, virtualByteCount: byteCount, answer: .pastTheEnd)
            guard offset < byteCount else { return }
            answer = try device.holeOrData(at: offset, limit: 1).isHole ? .hole : .data
            place = Explanation.Place(path: device.name, offset: offset)
        } catch {
            throw ImageError(.system(error, operation: "cannot examine"), file: device.name)
        }
    }
}
