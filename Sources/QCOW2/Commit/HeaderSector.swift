/// The first 512 bytes of an image, live: every switch of a table is one write of them.
package final class HeaderSector: Sendable {
    private let file: HostFile
    private let state: Monitor<State>

    private struct State {
        var bytes: [UInt8]
        var isDirty = false
    }

    package static let byteCount = 512

    package init(of file: HostFile) throws(ImageError) {
        self.file = file
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: HeaderSector.byteCount, alignment: 8)
        defer { buffer.deallocate() }
        try file.read(into: buffer, at: 0)
        state = Monitor(State(bytes: Array(buffer)))
    }

    /// Changes header bytes; they reach the file with the next commit's phase 2.
    package func change(_ body: (inout [UInt8]) -> Void) {
        state.withLock { state in
            body(&state.bytes)
            state.isDirty = true
        }
    }

    /// Changes header bytes and makes them durable at once: for bits that must be set or cleared
    /// before something else is written.
    package func changeNow(_ body: (inout [UInt8]) -> Void) throws(ImageError) {
        let bytes = state.withLock { state in
            body(&state.bytes)
            return state.bytes
        }
        try file.write(bytes, at: 0)
        try file.flush()
    }

    /// The 8-byte number at `offset`, as the next write of the sector has it.
    package func number(at offset: Int) -> UInt64 {
        state.withLock { $0.bytes.withUnsafeBytes { $0.bigEndian(at: offset) ?? 0 } }
    }

    package var isDirty: Bool { state.withLock { $0.isDirty } }

    /// The bytes to write, nil where nothing changed since the last freeze.
    package func freeze() -> [UInt8]? {
        state.withLock { state in
            defer { state.isDirty = false }
            return state.isDirty ? state.bytes : nil
        }
    }
}

/// Where the fields of a header stand, in bytes from its start.
package enum HeaderField {
    package static let backingFileOffset = 8
    package static let size = 24
    package static let l1EntryCount = 36
    package static let l1Offset = 40
    package static let refcountTableOffset = 48
    package static let refcountTableClusterCount = 56
    package static let snapshotCount = 60
    package static let snapshotsOffset = 64
    package static let incompatibleFeatures = 72
    package static let autoclearFeatures = 88
}
