internal import Glibc

/// Reads and writes of any alignment on a descriptor that was opened with `O_DIRECT`, which itself
/// takes only whole blocks from aligned memory.
///
/// Requests that fit are passed through; others go through an aligned buffer.  A write that does
/// not cover its first or last block reads that block before.
final class DirectTransfer: Sendable {
    /// The unit of offsets, lengths and addresses.  Every disk under a file system takes 4096.
    private let blockByteCount: Int
    private let isBlockDevice: Bool
    private let descriptor: Int32
    /// Held shared by writes of whole blocks and alone by all others: those rewrite a block around
    /// their bytes, and set the length of the file back when its end lies inside of that block.
    private let order = ReadWriteLock()

    private static let bufferByteCount = 1 << 20

    init(_ descriptor: Int32, isBlockDevice: Bool) throws(SystemError) {
        self.descriptor = descriptor
        self.isBlockDevice = isBlockDevice
        let unit = isBlockDevice ? try Platform.logicalBlockByteCount(descriptor) : 4096
        guard (512...65536).contains(unit), unit & (unit - 1) == 0 else { throw .invalid }
        blockByteCount = unit
    }

    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        if fits(UnsafeRawBufferPointer(buffer), at: offset) {
            return try readFully(descriptor, into: buffer, at: offset)
        }
        var done = 0
        while done < buffer.count {
            let position = offset.addingReportingOverflow(UInt64(done))
            if position.overflow { break }
            let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
            let count = try readPart(into: rest, at: position.partialValue)
            if count == 0 { break }
            done += count
        }
        return done
    }

    /// Reads what one aligned buffer holds; 0 at the end of the file.
    private func readPart(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        let lead = Int(offset % UInt64(blockByteCount))
        let room = roundedUp(
            min(lead + min(buffer.count, Self.bufferByteCount), Self.bufferByteCount))
        let aligned = try AlignedBuffer(byteCount: room, alignment: blockByteCount)
        let count = try readFully(descriptor, into: aligned.bytes, at: offset - UInt64(lead))
        let usable = min(max(count - lead, 0), buffer.count)
        buffer.copyMemory(
            from: UnsafeRawBufferPointer(rebasing: aligned.bytes[lead..<lead + usable]))
        return usable
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        if bytes.isEmpty { return }
        guard offset <= UInt64(off_t.max) - UInt64(bytes.count) else {
            throw SystemError(code: EFBIG)
        }
        if bytes.count % blockByteCount == 0 && offset % UInt64(blockByteCount) == 0 {
            try order.shared { () throws(SystemError) in try writeBlocks(bytes, at: offset) }
        } else {
            try order.exclusive { () throws(SystemError) in try writeAround(bytes, at: offset) }
        }
    }

    /// Writes whole blocks, copying them where their memory is not aligned.
    private func writeBlocks(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64
    ) throws(SystemError) {
        if fits(bytes, at: offset) { return try writeFully(descriptor, bytes, at: offset) }
        let aligned = try AlignedBuffer(
            byteCount: min(bytes.count, Self.bufferByteCount), alignment: blockByteCount)
        var done = 0
        while done < bytes.count {
            let count = min(bytes.count - done, aligned.bytes.count)
            let part = UnsafeMutableRawBufferPointer(rebasing: aligned.bytes[..<count])
            part.copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[done..<done + count]))
            try writeFully(descriptor, UnsafeRawBufferPointer(part), at: offset + UInt64(done))
            done += count
        }
    }

    /// Writes bytes that cover their first or last block in part, and leaves the file as long as it
    /// was or as these bytes make it.
    private func writeAround(
        _ bytes: UnsafeRawBufferPointer, at offset: UInt64
    ) throws(SystemError) {
        let length = try isBlockDevice ? nil : fileByteCount()
        var done = 0
        while done < bytes.count {
            let position = offset + UInt64(done)
            let lead = Int(position % UInt64(blockByteCount))
            let count = min(bytes.count - done, Self.bufferByteCount - lead)
            let aligned = try AlignedBuffer(
                byteCount: roundedUp(lead + count), alignment: blockByteCount)
            // Only the edges matter, but one read of the whole is simpler and this path is rare.
            let present = try readFully(
                descriptor, into: aligned.bytes, at: position - UInt64(lead))
            UnsafeMutableRawBufferPointer(rebasing: aligned.bytes[present...])
                .initializeMemory(as: UInt8.self, repeating: 0)
            UnsafeMutableRawBufferPointer(rebasing: aligned.bytes[lead..<lead + count])
                .copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[done..<done + count]))
            try writeFully(
                descriptor, UnsafeRawBufferPointer(aligned.bytes), at: position - UInt64(lead))
            done += count
        }
        guard let length else { return }
        let wanted = max(length, offset + UInt64(bytes.count))
        if try fileByteCount() > wanted {
            _ = try retryingInterrupts { ftruncate(descriptor, off_t(wanted)) }
        }
    }

    private func fileByteCount() throws(SystemError) -> UInt64 {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw .last }
        return UInt64(clamping: status.st_size)
    }

    private func fits(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) -> Bool {
        let mask = UInt(blockByteCount - 1)
        return UInt(bitPattern: bytes.baseAddress) & mask == 0 && UInt(bytes.count) & mask == 0
            && offset & UInt64(mask) == 0
    }

    private func roundedUp(_ count: Int) -> Int {
        (count + blockByteCount - 1) & ~(blockByteCount - 1)
    }
}

/// Memory whose address is a multiple of `alignment`.
private struct AlignedBuffer: ~Copyable {
    let bytes: UnsafeMutableRawBufferPointer

    init(byteCount: Int, alignment: Int) throws(SystemError) {
        var address: UnsafeMutableRawPointer?
        let code = posix_memalign(&address, alignment, byteCount)
        guard code == 0 else { throw SystemError(code: code) }
        bytes = UnsafeMutableRawBufferPointer(start: address, count: byteCount)
    }

    deinit { free(bytes.baseAddress) }
}

/// A lock that many may hold shared, or one alone.
///
/// `@unchecked`: the only state is the lock itself, at an address that never changes.
private final class ReadWriteLock: @unchecked Sendable {
    private let lock: UnsafeMutablePointer<pthread_rwlock_t>

    init() {
        lock = .allocate(capacity: 1)
        lock.initialize(to: pthread_rwlock_t())
        pthread_rwlock_init(lock, nil)
    }

    deinit {
        pthread_rwlock_destroy(lock)
        lock.deallocate()
    }

    func shared<Failure: Error>(_ body: () throws(Failure) -> Void) throws(Failure) {
        pthread_rwlock_rdlock(lock)
        defer { pthread_rwlock_unlock(lock) }
        try body()
    }

    func exclusive<Failure: Error>(_ body: () throws(Failure) -> Void) throws(Failure) {
        pthread_rwlock_wrlock(lock)
        defer { pthread_rwlock_unlock(lock) }
        try body()
    }
}
