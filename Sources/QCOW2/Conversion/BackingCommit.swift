/// Writes an overlay's content into its backing file and empties the overlay.
public enum BackingCommit {
    /// Commits the image at `path` into the file below it.
    ///
    /// The backing file is complete and durable before the overlay gives anything up: whenever this
    /// is interrupted, the overlay reads as it did, and it can be started again.
    ///
    /// - Parameters:
    ///   - path: Where the overlay is.
    ///   - options: How its files are opened.
    ///   - empties: Whether the overlay's clusters are given back afterwards.
    ///   - progress: Told what part is done; false cancels.
    /// - Throws: `.backing` where there is no backing file; `.locked` where a program uses it;
    ///   `.cancelled`; what opening, reading and writing throw.
    public static func run(
        path: String, options: OpenOptions = OpenOptions(), empties: Bool = true,
        progress: ((Double) -> Bool)? = nil
    ) throws(ImageError) {
        let plan = try ChainPlan(path, options: options)
        // Our own locks on the files below would keep us from writing there.
        for file in plan.files.dropFirst() { file.close() }
        var chain = OpenedChain(capacity: 1, options: options)
        try Image.open([plan.files[0]], into: &chain)
        let overlay = try Image(chain)
        defer { try? overlay.close() }
        guard plan.files.count > 1 else {
            throw ImageError(.backing("has no backing file to commit to"), file: path)
        }
        let below = plan.files[1]
        let target = try Target(
            path: below.device.name, isRaw: below.header == nil, options: options)
        defer { try? target.close() }
        try target.grow(to: overlay.size)
        try copy(from: overlay, to: target, progress)
        try target.close()
        if empties { try overlay.giveUpAllClusters() }
        try overlay.close()
    }

    private static func copy(
        from overlay: Image, to target: Target, _ progress: ((Double) -> Bool)?
    ) throws(ImageError) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        var offset: UInt64 = 0
        while offset < overlay.size {
            let extent = try overlay.map.extent(at: offset, limit: overlay.size &- offset)
            var end = offset &+ extent.byteCount
            switch extent.kind {
            case .unallocated: break
            case .zeroPlain, .zeroAllocated: try target.zero(offset..<end)
            case .data, .compressed, .corrupt:
                end = min(end, offset &+ UInt64(buffer.count))
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(end &- offset)])
                try overlay.read(into: part, at: offset)
                try target.write(UnsafeRawBufferPointer(part), at: offset)
            }
            offset = end
            if let progress, !progress(Double(offset) / Double(max(overlay.size, 1))) {
                throw ImageError(.cancelled, file: overlay.top.file.name)
            }
        }
    }

    /// The backing file, opened for writing.
    private enum Target {
        case image(Image)
        case raw(FileDevice)

        init(path: String, isRaw: Bool, options: OpenOptions) throws(ImageError) {
            guard isRaw else {
                self = .image(try Image.open(path, options: options))
                return
            }
            let device = try FileDevice(path: path, access: .readWrite, mapsBytes: false)
            do throws(ImageError) {
                try ImageLock.take(.writer, on: device)
            } catch {
                device.close()
                throw error
            }
            self = .raw(device)
        }

        func grow(to size: UInt64) throws(ImageError) {
            switch self {
            case .image(let image):
                if image.size < size { try image.resize(to: size) }
            case .raw(let device):
                try on(device, "cannot grow") { () throws(SystemError) in
                    if try device.byteCount() < size { try device.resize(to: size) }
                }
            }
        }

        func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
            switch self {
            case .image(let image): try image.write(bytes, at: offset)
            case .raw(let device):
                try on(device, "cannot write") { () throws(SystemError) in
                    try device.write(bytes, at: offset)
                }
            }
        }

        func zero(_ range: Range<UInt64>) throws(ImageError) {
            switch self {
            case .image(let image): try image.discard(range)
            case .raw(let device):
                try on(device, "cannot write zeros") { () throws(SystemError) in
                    try device.makeZero(range)
                }
            }
        }

        /// Makes everything durable.
        func close() throws(ImageError) {
            switch self {
            case .image(let image): try image.close()
            case .raw(let device):
                defer { device.close() }
                try on(device, "cannot sync") { () throws(SystemError) in try device.flush() }
            }
        }

        private func on<Result>(
            _ device: FileDevice, _ operation: String, _ body: () throws(SystemError) -> Result
        ) throws(ImageError) -> Result {
            do throws(SystemError) {
                return try body()
            } catch {
                throw ImageError(.system(error, operation: operation), file: device.name)
            }
        }
    }
}

extension BlockDevice {
    /// Makes a range read as zeros, as a hole where the device can.
    func makeZero(_ range: Range<UInt64>) throws(SystemError) {
        do throws(SystemError) {
            return try punchHole(range)
        } catch {
            guard error == .notSupported else { throw error }
        }
        try writeZeros(range)
    }

    /// Writes zeros, which take space.
    func writeZeros(_ range: Range<UInt64>) throws(SystemError) {
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = Int(min(UInt64(ZeroArea.byteCount), range.upperBound &- offset))
            try write(UnsafeRawBufferPointer(rebasing: ZeroArea.bytes[..<count]), at: offset)
            offset &+= UInt64(count)
        }
    }
}

extension Image {
    /// Makes every cluster unallocated, so that the backing file shows through everywhere.
    func giveUpAllClusters() throws(ImageError) {
        let writing = try writer()
        try begin(writing)
        var offset: UInt64 = 0
        while offset < size {
            let extent = try map.extent(at: offset, limit: size &- offset)
            let end = min(offset &+ extent.byteCount, ranges.groupEnd(of: offset))
            guard extent.kind != .unallocated else {
                offset &+= extent.byteCount
                continue
            }
            try writing.commit.relieve()
            let held = ranges.lockExclusive(offset, end &- offset)
            defer { ranges.unlock(held) }
            try change(offset..<end, writing) { _, _ in .unallocated }
            offset = end
        }
    }
}
