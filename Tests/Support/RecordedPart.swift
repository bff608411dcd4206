package import QCOW2
internal import Synchronization

/// A part of a recording device that stands for a device of its own, with syncs of its own: so
/// that what a power cut leaves of two files is explored together.
package final class RecordedPart: BlockDevice {
    package let name: String
    package let readsZerosPastEnd = true
    private let base: RecordingDevice
    private let part: Range<Int>
    private let length: Mutex<Int>

    /// - Parameter length: Bytes that the part has; the rest of its room is zeros.
    package init(_ base: RecordingDevice, _ part: Range<Int>, length: Int, name: String) {
        (self.base, self.part, self.name) = (base, part, name)
        self.length = Mutex(length)
    }

    package func byteCount() throws(SystemError) -> UInt64 { UInt64(length.withLock { $0 }) }

    package func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        let end = length.withLock { $0 }
        guard offset < UInt64(end) else { return 0 }
        let count = min(buffer.count, end - Int(offset))
        return try base.read(
            into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]),
            at: UInt64(part.lowerBound) + offset)
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        let end = Int(offset) + bytes.count
        precondition(end <= part.count, "the part is too small for the test")
        try base.write(bytes, at: UInt64(part.lowerBound) + offset)
        length.withLock { $0 = max($0, end) }
    }

    package func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        let start = UInt64(part.lowerBound)
        let end = min(range.upperBound, UInt64(length.withLock { $0 }))
        if range.lowerBound < end {
            try base.punchHole(start + range.lowerBound..<start + end)
        }
    }

    package func flush() throws(SystemError) { base.flush(of: part) }

    package func resize(to byteCount: UInt64) throws(SystemError) { throw .notSupported }
}
