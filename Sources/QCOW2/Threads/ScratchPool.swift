internal import Glibc

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
    static let byteCount = 1 << 20

    /// An anonymous mapping: every page of it is the kernel's zero page.
    nonisolated(unsafe) static let start: UnsafeRawPointer = {
        let memory = mmap(nil, byteCount, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        guard let memory, memory != MAP_FAILED else {
            fatalError("no memory for a megabyte of zeros")
        }
        return UnsafeRawPointer(memory)
    }()

    static var bytes: UnsafeRawBufferPointer {
        UnsafeRawBufferPointer(start: start, count: byteCount)
    }
}
