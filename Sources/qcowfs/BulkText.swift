internal import Glibc
internal import QCOW2

/// Text on its way to standard output, of which there may be hundreds of megabytes: digits are made
/// in place, and whole pieces are written.
struct BulkText {
    private static let pieceByteCount = 1 << 16

    private var bytes: [UInt8] = []
    /// Why nothing is written any more.
    private var failure: SystemError?

    init() { bytes.reserveCapacity(Self.pieceByteCount + 256) }

    mutating func add(_ words: String) {
        bytes.append(contentsOf: words.utf8)
        writePiece()
    }

    mutating func add(_ number: UInt64) { add(digitsOf: number, base: 10) }

    /// `0x20000` and spaces up to `width` columns; zero has no prefix, as in C.
    mutating func add(hex number: UInt64, width: Int) {
        let start = bytes.count
        if number != 0 { bytes += [UInt8(ascii: "0"), UInt8(ascii: "x")] }
        add(digitsOf: number, base: 16)
        let missing = width - (bytes.count - start)
        if missing > 0 {
            bytes.append(contentsOf: repeatElement(UInt8(ascii: " "), count: missing))
        }
    }

    private mutating func add(digitsOf number: UInt64, base: UInt64) {
        withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 20) { digits in
            var start = digits.count
            var rest = number
            repeat {
                start -= 1
                let digit = UInt8(truncatingIfNeeded: rest % base)
                digits[start] = digit &+ (digit < 10 ? UInt8(ascii: "0") : UInt8(ascii: "a") &- 10)
                rest /= base
            } while rest > 0
            bytes.append(contentsOf: UnsafeBufferPointer(rebasing: digits[start...]))
        }
    }

    private mutating func writePiece() {
        if bytes.count >= Self.pieceByteCount { writeAll() }
    }

    private mutating func writeAll() {
        var done = 0
        while done < bytes.count, failure == nil {
            let count = bytes.withUnsafeBytes {
                write(STDOUT_FILENO, $0.baseAddress.map { $0 + done }, $0.count - done)
            }
            if count >= 0 {
                done += count
            } else if errno != EINTR {
                failure = .last
            }
        }
        bytes.removeAll(keepingCapacity: true)
    }

    /// Writes what is left.
    /// - Throws: What standard output said, now or before.
    mutating func finish() throws(Failure) {
        writeAll()
        if let failure { throw Failure("standard output", failure) }
    }
}
