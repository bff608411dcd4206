internal import Glibc

/// 512 bytes that say which guest sector they belong to and which write they come from, so that
/// foreign, torn and stale bytes show themselves.
package enum SectorPattern {
    package static let sectorSize = 512

    /// Fills one sector; value 0 stands for zeros.
    package static func fill(
        _ buffer: UnsafeMutableRawBufferPointer, sector: Int, value: UInt64
    ) {
        guard value != 0 else { return buffer.fillZero() }
        for position in stride(from: 0, to: sectorSize, by: 16) {
            buffer.storeBytes(of: UInt64(sector) | 1 << 63, toByteOffset: position, as: UInt64.self)
            buffer.storeBytes(of: value, toByteOffset: position + 8, as: UInt64.self)
        }
    }

    /// The bytes of a run of sectors that all hold `value`.
    package static func bytes(sectors: Range<Int>, value: UInt64) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: sectors.count * sectorSize)
        bytes.withUnsafeMutableBytes { buffer in
            for sector in sectors {
                let start = (sector - sectors.lowerBound) * sectorSize
                fill(
                    UnsafeMutableRawBufferPointer(rebasing: buffer[start..<start + sectorSize]),
                    sector: sector, value: value)
            }
        }
        return bytes
    }

    /// The value that a sector holds; nil where the bytes are torn or another sector's.
    package static func value(of bytes: UnsafeRawBufferPointer, sector: Int) -> UInt64? {
        let first = bytes.loadUnaligned(as: UInt64.self)
        let isUniform =
            memcmp(bytes.baseAddress!, bytes.baseAddress! + 16, sectorSize - 16) == 0
        let value = bytes.loadUnaligned(fromByteOffset: 8, as: UInt64.self)
        guard isUniform else { return nil }
        if first == 0 && value == 0 { return 0 }
        return first == UInt64(sector) | 1 << 63 && value != 0 ? value : nil
    }
}
