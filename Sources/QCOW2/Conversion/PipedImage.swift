/// An image that comes through a pipe, whose clusters are read about in the order in which they
/// lie: as `convert` and `qemu-img convert` write them, each L2 table before its clusters.
final class PipedImage: Sendable {
    let image: Image
    private let device: PipeDevice
    private let state = Monitor(State())

    private struct State {
        /// The L1 index whose L2 table was read as a whole.
        var table: Int?
        /// The end of all clusters that were asked for, in the file.
        var dataEnd: UInt64 = 0
    }

    init(_ device: PipeDevice, options: OpenOptions) throws(ImageError) {
        self.device = device
        let header = try Self.explaining(device) { () throws(ImageError) in
            try Header.readSupported(from: device)
        }
        try header.checkStandsAlone(device.name)
        let l1End = header.l1Offset &+ UInt64(header.l1EntryCount) &* 8
        try Self.require(upTo: l1End, of: device)
        image = try Self.explaining(device) { () throws(ImageError) in
            try Image.open(device, options: options)
        }
    }

    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(ImageError) {
        try Self.explaining(device) { () throws(ImageError) in
            try image.read(into: buffer, at: offset)
        }
    }

    /// As `SourceDisk.run`, and no further than one L2 table reaches: what lies behind may not have
    /// come yet.  Called in ascending order.
    func run(
        at offset: UInt64, limit: UInt64
    ) throws(ImageError) -> (isHole: Bool, byteCount: UInt64) {
        let map = image.map
        let coverage = 1 &<< map.coverageBits
        let limit = min(limit, coverage &- offset & (coverage &- 1))
        return try Self.explaining(device) { () throws(ImageError) in
            try readTable(Int(truncatingIfNeeded: offset &>> map.coverageBits))
            let extent = try map.extent(at: offset, limit: limit)
            switch extent.kind {
            case .unallocated, .zeroPlain, .zeroAllocated: return (true, extent.byteCount)
            case .data: note(dataEnd: extent.host &+ extent.byteCount)
            case .compressed, .corrupt: break
            }
            return (false, extent.byteCount)
        }
    }

    private func note(dataEnd end: UInt64) {
        state.withLock { $0.dataEnd = max($0.dataEnd, end) }
    }

    /// Reads an L2 table into the cache when its first entry is wanted: later its bytes are gone.
    private func readTable(_ index: Int) throws(ImageError) {
        guard state.withLock({ $0.table != index }) else { return }
        let map = image.map
        let entry = map.l1Entry(index)
        if entry.offset != 0, entry.offset & map.clusterMask == 0 {
            try Self.require(upTo: entry.offset &+ map.clusterMask &+ 1, of: device)
            let start = UInt64(index) &<< map.coverageBits
            let step: UInt64 = 1 &<< (map.sliceBits &+ map.clusterBits)
            for slice in stride(
                from: start, to: min(start &+ map.coverage, image.size), by: Int(step))
            {
                _ = try map.extent(at: slice, limit: 1)
            }
        }
        state.withLock { $0.table = index }
    }

    /// Reads what is left, so that whoever writes it ends well.
    /// - Throws: `.corrupt` where the pipe has ended before the image.
    func finish() throws(ImageError) {
        _ = try Self.explaining(device) { () throws(ImageError) in
            do throws(SystemError) {
                return try device.pull(upTo: .max)
            } catch {
                throw ImageError(.system(error, operation: "reading"), file: device.name)
            }
        }
        let end = device.progress.byteCount
        // Zeros at the end of the last cluster may be left out, sector by sector.
        if state.withLock({ $0.dataEnd }) > end, end % 512 != 0 { throw Self.cutShort(device) }
    }

    // MARK: Words

    private static func require(upTo end: UInt64, of device: PipeDevice) throws(ImageError) {
        try explaining(device) { () throws(ImageError) in
            do throws(SystemError) {
                guard try device.pull(upTo: end) else { throw .missing }
            } catch {
                throw ImageError(.system(error, operation: "reading"), file: device.name)
            }
        }
    }

    private static func cutShort(_ device: PipeDevice) -> ImageError {
        ImageError(
            .corrupt("ends after \(device.progress.byteCount) bytes, before the image does"),
            file: device.name)
    }

    /// Says of what a pipe cannot do which way is left.
    private static func explaining<Result>(
        _ device: PipeDevice, _ body: () throws(ImageError) -> Result
    ) throws(ImageError) -> Result {
        do throws(ImageError) {
            return try body()
        } catch {
            switch error.kind {
            case .system(.gone, _):
                throw ImageError(
                    .invalidArgument(
                        "the image's clusters come in another order than a pipe can be read in: "
                            + "give --spool DIR, or the file's name"), file: device.name)
            case .system(.missing, _): throw cutShort(device)
            case .system(.cancelled, _): throw ImageError(.cancelled, file: device.name)
            default: throw error
            }
        }
    }
}

extension ClusterMap {
    /// Bytes of the disk that one L2 table describes.
    fileprivate var coverage: UInt64 { 1 &<< coverageBits }
}

extension Header {
    /// Throws where an image needs other files: one that comes without a place of its own has no
    /// directory in which to look for them.
    func checkStandsAlone(_ name: String) throws(ImageError) {
        if let backing = backingFile {
            throw ImageError(
                .backing(
                    "has the backing file '\(backing)', which is not looked for from a pipe: "
                        + "give the file's name"), file: name)
        }
        if hasDataFile {
            throw ImageError(
                .dataFile(
                    "has an external data file, which is not looked for from a pipe: "
                        + "give the file's name"), file: name)
        }
    }
}
