private import Glibc
package import Synchronization

/// A fixed number of 64-bit atomics, zero at first.
///
/// The memory comes from `calloc`: what is never touched takes no room.
package struct AtomicArray: ~Copyable, @unchecked Sendable {
    private let base: UnsafeMutablePointer<Atomic<UInt64>>
    package let count: Int

    /// - Parameters:
    ///   - purpose: what is kept there, for the words of the error.
    ///   - file: the image that it is needed for, likewise.
    /// - Throws: `.system` with ENOMEM where so much memory cannot be had.
    package init(count: Int, for purpose: String, of file: String = "") throws(ImageError) {
        guard let memory = calloc(max(count, 1), 8) else {
            throw ImageError(.system(.noMemory, operation: "memory for \(purpose)"), file: file)
        }
        base = memory.assumingMemoryBound(to: Atomic<UInt64>.self)
        self.count = count
    }

    deinit { free(base) }

    /// The atomic at `index`, which the caller keeps below `count`.
    @inline(__always)
    package subscript(index: Int) -> Atomic<UInt64> {
        unsafeAddress {
            assert(index >= 0 && index < count)
            return UnsafePointer(base + index)
        }
    }

    /// The address of element `index`.
    @inline(__always)
    package func address(_ index: Int) -> UnsafePointer<Atomic<UInt64>> {
        UnsafePointer(base + index)
    }
}
