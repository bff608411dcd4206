internal import Glibc

/// Bytes that nobody may find in memory later: a passphrase, a key.
///
/// They are wiped when the last reference goes, or before by `wipe`.
final class SecretBytes: @unchecked Sendable {
    // `@unchecked`: written while it is made, by one thread, and by `wipe`, after its last use.
    private let buffer: UnsafeMutableRawBufferPointer

    /// Bytes that `fill` writes.
    init<Failure: Error>(
        count: Int, _ fill: (UnsafeMutableRawBufferPointer) throws(Failure) -> Void
    ) throws(Failure) {
        buffer = .allocate(byteCount: count, alignment: 16)
        do throws(Failure) {
            try fill(buffer)
        } catch {
            buffer.wipe()
            buffer.deallocate()
            throw error
        }
    }

    convenience init(copying bytes: UnsafeRawBufferPointer) {
        self.init(count: bytes.count) { $0.copyMemory(from: bytes) }
    }

    deinit {
        wipe()
        buffer.deallocate()
    }

    var count: Int { buffer.count }

    /// The bytes, for the time that the object is referred to.
    var bytes: UnsafeRawBufferPointer { UnsafeRawBufferPointer(buffer) }

    /// The same bytes for whoever has just made the object, and fills it step by step.
    var room: UnsafeMutableRawBufferPointer { buffer }

    /// Makes all bytes zero.
    func wipe() { buffer.wipe() }
}

extension UnsafeMutableRawBufferPointer {
    /// Makes all bytes zero, whatever a compiler thinks of bytes that nobody reads any more.
    func wipe() {
        if let start = baseAddress { explicit_bzero(start, count) }
    }
}
