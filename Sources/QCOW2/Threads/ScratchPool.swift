internal import CLinux

/// Buffers for copying clusters, reused: as many as there are threads that copy at one time.
package struct ScratchPool: ~Copyable, Sendable {
    /// Bytes of a buffer: larger clusters are copied in pieces.
    package static let byteCount = 256 << 10

    private struct Free { var buffers: [UInt] = [] }
    private let free = Monitor(Free())

    package init() {}

    deinit {
        free.withLock { free in
            for address in free.buffers {
                UnsafeMutableRawPointer(bitPattern: address)?.deallocate()
            }
        }
    }

    package borrowing func withBuffer<Result, Failure: Error>(
        _ body: (UnsafeMutableRawBufferPointer) throws(Failure) -> Result
    ) throws(Failure) -> Result {
        let address = free.withLock { $0.buffers.popLast() }
        let start =
            address.flatMap { UnsafeMutableRawPointer(bitPattern: $0) }
            ?? .allocate(byteCount: ScratchPool.byteCount, alignment: 4096)
        defer { free.withLock { $0.buffers.append(UInt(bitPattern: start)) } }
        return try body(UnsafeMutableRawBufferPointer(start: start, count: ScratchPool.byteCount))
    }
}

/// A megabyte of zeros that nobody writes to.
enum ZeroArea {
    static let byteCount = Int(QCOWFS_ZERO_AREA_SIZE)

    static var start: UnsafeRawPointer { qcowfs_zero_area() }

    static var bytes: UnsafeRawBufferPointer {
        UnsafeRawBufferPointer(start: start, count: byteCount)
    }
}
