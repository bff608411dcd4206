internal import Glibc
package import QCOW2

extension MountedImage {
    /// Writes `bytes` at `offset` as far as they lie inside the disk, and returns how many did.
    ///
    /// A disk does not grow by being written to: at its end a write is short, past it ENOSPC.
    package borrowing func write(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        let count = clipped(bytes.count, at: offset)
        guard count > 0 || bytes.isEmpty else { throw .noSpace }
        let inside = UnsafeRawBufferPointer(rebasing: bytes[..<count])
        if rules.zeroDetection != .off, inside.isAllZeros {
            try attempt { () throws(ImageError) in
                try image.writeZeroes(
                    offset..<(offset &+ UInt64(clamping: count)),
                    keepingSpace: rules.zeroDetection == .on)
            }
        } else {
            try attempt { () throws(ImageError) in try image.write(inside, at: offset) }
        }
        return count
    }

    /// Returns when data and metadata are on stable storage.
    package borrowing func flush() throws(SystemError) {
        try attempt { () throws(ImageError) in try image.flush() }
    }
}

extension UnsafeRawBufferPointer {
    /// Whether every byte is 0.
    package var isAllZeros: Bool {
        guard let start = baseAddress, let first, first == 0 else { return isEmpty }
        // Each byte equals the one before it, and the first is 0.
        return memcmp(start, start + 1, count - 1) == 0
    }
}
