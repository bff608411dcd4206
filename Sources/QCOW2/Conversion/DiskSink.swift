/// What a disk is copied to, a part at a time, by several threads.
protocol DiskSink: Sendable {
    /// Stores bytes that are not all zero.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError)

    /// Makes `range` read as zeros.
    func zero(_ range: Range<UInt64>) throws(ImageError)

    /// Makes the start of `range` the source's bytes without looking at them, and returns how many:
    /// 0 where they have to be read and written.
    func adopt(_ range: Range<UInt64>) throws(ImageError) -> UInt64

    /// Whether `adopt` may do something.
    var adopts: Bool { get }
}

extension DiskSink {
    func adopt(_ range: Range<UInt64>) throws(ImageError) -> UInt64 { 0 }
    var adopts: Bool { false }
}

/// A raw disk on a device.
struct RawSink: DiskSink {
    private let device: any BlockDevice
    private enum Zeros { case areThere, punched, written }

    /// What makes a range read as zeros.
    private let zeros: Zeros
    private let shared: SharedSpace?

    /// Makes the device `size` bytes long, and empty where it can be.
    /// - Parameters:
    ///   - keepsZeros: Whether zeros take space too.
    ///   - shared: How bytes come to the device without a copy.
    init(
        _ device: any BlockDevice, size: UInt64, keepsZeros: Bool,
        sharing shared: SharedSpace? = nil
    ) throws(ImageError) {
        self.device = device
        self.shared = shared
        zeros = keepsZeros ? .written : device.readsZerosPastEnd ? .areThere : .punched
        do throws(SystemError) {
            if device.readsZerosPastEnd {
                try device.resize(to: 0)
                try device.resize(to: size)
            } else if try device.byteCount() < size {
                throw .noSpace
            }
        } catch {
            throw ImageError(.system(error, operation: "cannot set the length"), file: device.name)
        }
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
        do throws(SystemError) {
            try device.write(bytes, at: offset)
        } catch {
            throw ImageError(
                .system(error, operation: "cannot write at \(offset)"), file: device.name)
        }
    }

    /// Makes the device `end` bytes long, where it can have any length.
    func setEnd(_ end: UInt64) throws(ImageError) {
        guard device.readsZerosPastEnd else { return }
        do throws(SystemError) {
            try device.resize(to: end)
        } catch {
            throw ImageError(.system(error, operation: "cannot set the length"), file: device.name)
        }
    }

    func zero(_ range: Range<UInt64>) throws(ImageError) {
        do throws(SystemError) {
            switch zeros {
            case .areThere: break
            case .punched: try device.makeZero(range)
            case .written: try device.writeZeros(range)
            }
        } catch {
            throw ImageError(
                .system(error, operation: "cannot write zeros"), file: device.name)
        }
    }
}

extension RawSink {
    var adopts: Bool { shared != nil }

    /// Shares what lies in a file, and leaves out what is a hole there.
    func adopt(_ range: Range<UInt64>) throws(ImageError) -> UInt64 {
        guard let shared, let place = try shared.place(of: range),
            let target = device as? FileDevice
        else { return 0 }
        do throws(SystemError) {
            let run = try place.file.holeOrData(at: place.offset, limit: place.byteCount)
            if run.isHole { return run.byteCount }
            let byteCount = shared.wholeBlocks(run.byteCount)
            guard byteCount > 0 else { return 0 }
            try target.share(
                place.offset..<place.offset &+ byteCount, of: place.file, at: range.lowerBound)
            return byteCount
        } catch .notSupported {
            return 0
        } catch {
            throw ImageError(
                .system(error, operation: "cannot write at \(range.lowerBound)"),
                file: device.name)
        }
    }
}

/// A new qcow2 image without a backing file.
struct ImageSink: DiskSink {
    private let image: Image
    private let keepsZeros: Bool
    private let shared: SharedSpace?

    /// - Parameter shared: How clusters come to the image without a copy.
    init(_ image: Image, keepsZeros: Bool, sharing shared: SharedSpace? = nil) {
        self.image = image
        self.keepsZeros = keepsZeros
        self.shared = shared
    }

    /// Writes bytes, or shares their space with the source, where they were found not to be zeros.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
        var start = offset
        let end = offset &+ UInt64(bytes.count)
        while start < end,
            let place = try shared?.place(of: start..<end, alignment: image.clusterByteCount)
        {
            let done = try image.adopt(place, at: start)
            if done == 0 { break }
            start &+= done
        }
        guard start < end else { return }
        try image.write(
            UnsafeRawBufferPointer(rebasing: bytes[Int(start &- offset)...]), at: start)
    }

    /// What was never written reads as zeros.
    func zero(_ range: Range<UInt64>) throws(ImageError) {
        guard keepsZeros else { return }
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = Int(min(UInt64(ZeroArea.byteCount), range.upperBound &- offset))
            try image.write(
                UnsafeRawBufferPointer(rebasing: ZeroArea.bytes[..<count]), at: offset)
            offset &+= UInt64(count)
        }
    }
}
