package import QCOW2

/// A device that hands on to another one what it does not answer itself.
package protocol ForwardingDevice: BlockDevice {
    var base: any BlockDevice { get }
}

extension ForwardingDevice {
    package var name: String { base.name }
    package var readsZerosPastEnd: Bool { base.readsZerosPastEnd }

    package func byteCount() throws(SystemError) -> UInt64 { try base.byteCount() }

    package func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        try base.read(into: buffer, at: offset)
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        try base.write(bytes, at: offset)
    }

    package func flush() throws(SystemError) { try base.flush() }
    package func resize(to byteCount: UInt64) throws(SystemError) {
        try base.resize(to: byteCount)
    }
    package func punchHole(_ range: Range<UInt64>) throws(SystemError) {
        try base.punchHole(range)
    }
    package func nextData(from offset: UInt64) throws(SystemError) -> UInt64? {
        try base.nextData(from: offset)
    }
    package func nextHole(from offset: UInt64) throws(SystemError) -> UInt64 {
        try base.nextHole(from: offset)
    }
}
