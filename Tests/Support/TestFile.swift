package import Glibc

/// What a system call answered to a test.
package struct CallError: Error, CustomStringConvertible, Equatable {
    package let call: String
    package let code: Int32
    package var description: String { "\(call): \(String(cString: strerror(code)))" }
}

/// An open file with the calls that tests make, each failing with its `errno`.
package final class TestFile: Sendable {
    package let descriptor: Int32
    package let path: String

    package init(_ path: String, _ flags: Int32, mode: mode_t = 0o600) throws {
        self.path = path
        descriptor = open(path, flags | O_CLOEXEC, mode)
        guard descriptor >= 0 else { throw CallError(call: "open \(path)", code: errno) }
    }

    deinit { close(descriptor) }

    private func done(_ result: Int, _ call: String) throws -> Int {
        guard result >= 0 else { throw CallError(call: "\(call) \(path)", code: errno) }
        return result
    }

    package func byteCount() throws -> Int { try Int(status().st_size) }

    package func status() throws -> stat {
        var status = stat()
        _ = try done(Int(fstat(descriptor, &status)), "fstat")
        return status
    }

    /// Reads until `buffer` is full or the file ends; the rest of `buffer` stays as it was.
    @discardableResult
    package func read(into buffer: UnsafeMutableRawBufferPointer, at offset: Int) throws -> Int {
        var total = 0
        while total < buffer.count {
            let count = try done(
                pread(
                    descriptor, buffer.baseAddress! + total, min(buffer.count - total, 1 << 30),
                    off_t(offset + total)), "pread")
            if count == 0 { break }
            total += count
        }
        return total
    }

    package func read(_ range: Range<Int>) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: range.count)
        let count = try bytes.withUnsafeMutableBytes { try read(into: $0, at: range.lowerBound) }
        return Array(bytes[..<count])
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws {
        var total = 0
        while total < bytes.count {
            total += try writeOnce(
                UnsafeRawBufferPointer(rebasing: bytes[total...]),
                at: offset + total)
        }
    }

    package func write(_ bytes: [UInt8], at offset: Int) throws {
        try bytes.withUnsafeBytes { try write($0, at: offset) }
    }

    /// One call of pwrite, which may store less than asked.
    package func writeOnce(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws -> Int {
        try done(pwrite(descriptor, bytes.baseAddress, bytes.count, off_t(offset)), "pwrite")
    }

    package func sync() throws { _ = try done(Int(fsync(descriptor)), "fsync") }
    package func syncData() throws { _ = try done(Int(fdatasync(descriptor)), "fdatasync") }

    package func truncate(to byteCount: Int) throws {
        _ = try done(Int(ftruncate(descriptor, off_t(byteCount))), "ftruncate")
    }

    package func allocate(_ mode: Int32, _ range: Range<Int>) throws {
        _ = try done(
            Int(fallocate(descriptor, mode, off_t(range.lowerBound), off_t(range.count))),
            "fallocate")
    }

    package func punch(_ range: Range<Int>) throws {
        try allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range)
    }

    package func zero(_ range: Range<Int>) throws { try allocate(FALLOC_FL_ZERO_RANGE, range) }

    /// Where data starts at or after `offset`; nil where only a hole follows.
    package func nextData(from offset: Int) throws -> Int? {
        let position = lseek(descriptor, off_t(offset), SEEK_DATA)
        if position < 0, errno == ENXIO { return nil }
        return try done(Int(position), "lseek SEEK_DATA")
    }

    package func nextHole(from offset: Int) throws -> Int {
        try done(Int(lseek(descriptor, off_t(offset), SEEK_HOLE)), "lseek SEEK_HOLE")
    }

    /// The ranges that lseek calls data, ascending, neighbours joined.
    package func dataRanges() throws -> [Range<Int>] {
        let end = try byteCount()
        var ranges: [Range<Int>] = []
        var position = 0
        while position < end, let start = try nextData(from: position) {
            position = try nextHole(from: start)
            guard position > start else {
                throw CallError(call: "SEEK_HOLE at \(start) answers \(position)", code: EINVAL)
            }
            ranges.append(start..<min(position, end))
        }
        return ranges
    }
}
