internal import Glibc
internal import QCOW2

/// Text on its way to standard output, of which there may be hundreds of megabytes: it is put
/// together in one buffer, and written whenever that is full.
final class BulkText {
    private static let pieceByteCount = 1 << 16
    /// Bytes that a call may add at least: a word, a number or a column.
    private static let roomByteCount = 256

    private let buffer = UnsafeMutableRawPointer.allocate(
        byteCount: pieceByteCount + roomByteCount, alignment: 16)
    private var byteCount = 0
    /// Why nothing is written any more.
    private var failure: SystemError?

    deinit { buffer.deallocate() }

    /// Adds words of the program's own, which are short.
    func add(_ words: StaticString) {
        (buffer + byteCount).copyMemory(from: words.utf8Start, byteCount: words.utf8CodeUnitCount)
        grow(by: words.utf8CodeUnitCount)
    }

    /// Adds words of any length.
    func add(text: String) {
        for byte in text.utf8 {
            buffer.storeBytes(of: byte, toByteOffset: byteCount, as: UInt8.self)
            grow(by: 1)
        }
    }

    func add(_ number: UInt64) {
        withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 20) { digits in
            var start = digits.count
            var rest = number
            // A constant base is divided by without a division.
            repeat {
                start &-= 1
                digits[start] = UInt8(ascii: "0") &+ UInt8(truncatingIfNeeded: rest % 10)
                rest /= 10
            } while rest > 0
            add(UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(digits)[start...]))
        }
    }

    /// `0x20000` and spaces up to `width` columns; zero has no prefix, as in C.
    func add(hex number: UInt64, width: Int) {
        let digits = String(number, radix: 16)
        if number != 0 { add("0x") }
        add(text: digits)
        let missing = width - digits.utf8.count - (number != 0 ? 2 : 0)
        for _ in 0..<max(missing, 0) { add(" ") }
    }

    private func add(_ bytes: UnsafeRawBufferPointer) {
        guard let start = bytes.baseAddress else { return }
        (buffer + byteCount).copyMemory(from: start, byteCount: bytes.count)
        grow(by: bytes.count)
    }

    private func grow(by count: Int) {
        byteCount &+= count
        if byteCount >= Self.pieceByteCount { writeAll() }
    }

    private func writeAll() {
        var done = 0
        while done < byteCount, failure == nil {
            let count = write(STDOUT_FILENO, buffer + done, byteCount - done)
            if count >= 0 {
                done += count
            } else if errno != EINTR {
                failure = .last
            }
        }
        byteCount = 0
    }

    /// Writes what is left.
    /// - Throws: What standard output said, now or before.
    func finish() throws(Failure) {
        writeAll()
        if let failure { throw Failure("standard output", failure) }
    }
}
