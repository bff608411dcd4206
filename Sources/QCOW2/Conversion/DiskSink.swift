/// What a disk is copied to, a part at a time, by several threads.
protocol DiskSink: Sendable {
    /// Stores bytes that are not all zero.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError)

    /// Makes `range` read as zeros.
    func zero(_ range: Range<UInt64>) throws(ImageError)
}

/// A raw disk on a device.
struct RawSink: DiskSink {
    private let device: any BlockDevice
    /// Whether zeros have to be written.
    private let writesZeros: Bool

    /// Makes the device `size` bytes long, and empty where it can be.
    /// - Parameter keepsZeros: Whether zeros take space too.
    init(_ device: any BlockDevice, size: UInt64, keepsZeros: Bool) throws(ImageError) {
        self.device = device
        writesZeros = keepsZeros || !device.readsZerosPastEnd
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
        guard writesZeros else { return }
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = Int(min(UInt64(ZeroArea.byteCount), range.upperBound &- offset))
            try write(UnsafeRawBufferPointer(rebasing: ZeroArea.bytes[..<count]), at: offset)
            offset &+= UInt64(count)
        }
    }
}

/// A new qcow2 image without a backing file.
struct ImageSink: DiskSink {
    private let image: Image
    private let keepsZeros: Bool

    init(_ image: Image, keepsZeros: Bool) {
        self.image = image
        self.keepsZeros = keepsZeros
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
        try image.write(bytes, at: offset)
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
