internal import Glibc

/// Fills `buffer` from `offset` on; returns fewer bytes only where the file ends.
func readFully(
    _ descriptor: Int32, into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
) throws(SystemError) -> Int {
    guard let address = buffer.baseAddress, var position = off_t(exactly: offset) else {
        return 0
    }
    var done = 0
    while done < buffer.count {
        let count = try retryingInterrupts {
            pread(descriptor, address + done, buffer.count - done, position)
        }
        if count == 0 { break }
        done += count
        // A file's end is an off_t, so no position that was read overflows.
        position &+= off_t(count)
    }
    return done
}

/// Writes all of `bytes` at `offset`.
func writeFully(
    _ descriptor: Int32, _ bytes: UnsafeRawBufferPointer, at offset: UInt64
) throws(SystemError) {
    guard let address = bytes.baseAddress, !bytes.isEmpty else { return }
    guard let start = off_t(exactly: offset),
        !start.addingReportingOverflow(off_t(bytes.count)).overflow
    else { throw SystemError(code: EFBIG) }
    var done = 0
    while done < bytes.count {
        let count = try retryingInterrupts {
            pwrite(descriptor, address + done, bytes.count - done, start + off_t(done))
        }
        if count == 0 { throw .noSpace }
        done += count
    }
}
