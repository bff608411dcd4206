internal import Glibc

/// The bytes of a pipe, which come once and in order: what came lately can be read again, what came
/// before is gone.
final class PipeDevice: BlockDevice {
    /// Bytes that are kept: programs that write images with several threads write some clusters
    /// later than their neighbours, by up to 32 MiB as measured with 16 of qemu-img's.
    static let windowByteCount = 128 << 20
    /// What a raw disk needs of it.
    private static let narrowByteCount = 4 << 20
    private static let pieceByteCount = 1 << 20

    let name: String
    private let descriptor: Int32
    private let isCancelled: @Sendable () -> Bool
    private let state: Monitor<State>

    private struct State: ~Copyable {
        /// Byte `n` of the pipe is at `n` modulo `window`.
        let ring: UnsafeMutableRawPointer
        var window = UInt64(PipeDevice.windowByteCount)
        /// How many bytes have come.
        var end: UInt64 = 0
        var hasEnded = false

        deinit { munmap(ring, PipeDevice.windowByteCount) }
    }

    /// - Parameters:
    ///   - descriptor: its owner's; it is not closed here.
    ///   - isCancelled: asked while nothing comes.
    init(
        _ descriptor: Int32, name: String, isCancelled: @escaping @Sendable () -> Bool
    ) throws(ImageError) {
        // Memory is taken when bytes come.
        let ring = mmap(
            nil, Self.windowByteCount, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let ring, ring != MAP_FAILED else {
            throw ImageError(.system(.last, operation: "cannot keep what comes"), file: name)
        }
        self.descriptor = descriptor
        self.name = name
        self.isCancelled = isCancelled
        state = Monitor(State(ring: ring))
    }

    /// Keeps little from here on.  Not much may have come yet.
    func narrow() { state.withLock { $0.window = UInt64(Self.narrowByteCount) } }

    /// How many bytes have come, and whether that is all.
    var progress: (byteCount: UInt64, hasEnded: Bool) {
        state.withLock { ($0.end, $0.hasEnded) }
    }

    /// Endless as long as nobody knows better.
    func byteCount() throws(SystemError) -> UInt64 {
        state.withLock { $0.hasEnded ? $0.end : UInt64(Int64.max) }
    }

    /// - Throws: `.gone` for bytes that are no longer kept, `.missing` where the pipe has ended
    ///   before all of them, `.cancelled`, and what reading says.
    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        let wanted = offset.addingReportingOverflow(UInt64(buffer.count))
        guard !buffer.isEmpty, !wanted.overflow else { return 0 }
        return try state.withLock { state throws(SystemError) in
            try pull(upTo: wanted.partialValue, &state)
            guard offset < state.end else { throw .missing }
            // Nothing is kept that lies a window or more before the end.
            guard state.end <= state.window || offset >= state.end - state.window else {
                throw .gone
            }
            let count = Int(min(wanted.partialValue, state.end) - offset)
            Self.copy(count, at: offset, from: state, to: buffer)
            return count
        }
    }

    /// Reads on until `end` bytes have come, or all; says whether there were as many.
    func pull(upTo end: UInt64) throws(SystemError) -> Bool {
        try state.withLock { state throws(SystemError) in
            try pull(upTo: end, &state)
            return state.end >= end
        }
    }

    private func pull(upTo wanted: UInt64, _ state: inout State) throws(SystemError) {
        while state.end < wanted, !state.hasEnded {
            let place = Int(state.end % state.window)
            let room = min(Self.pieceByteCount, Int(state.window) - place)
            let count = try Self.wait(for: descriptor, isCancelled) {
                Glibc.read(descriptor, state.ring + place, room)
            }
            state.end += UInt64(count)
            state.hasEnded = count == 0
        }
    }

    private static func copy(
        _ count: Int, at offset: UInt64, from state: borrowing State,
        to buffer: UnsafeMutableRawBufferPointer
    ) {
        var done = 0
        while done < count {
            let place = Int((offset + UInt64(done)) % state.window)
            let part = min(count - done, Int(state.window) - place)
            UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + part]).copyMemory(
                from: UnsafeRawBufferPointer(start: state.ring + place, count: part))
            done += part
        }
    }

    /// Reads once there is something, looking now and then whether anybody still wants it.
    private static func wait(
        for descriptor: Int32, _ isCancelled: () -> Bool, _ read: () -> Int
    ) throws(SystemError) -> Int {
        while true {
            var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            let ready = poll(&entry, 1, 200)
            if isCancelled() { throw .cancelled }
            guard ready != 0 else { continue }
            let count = read()
            if count >= 0 { return count }
            guard errno == EINTR || errno == EAGAIN else { throw .last }
        }
    }

    // Nothing is written to a pipe that is read.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        throw .notSupported
    }
    func flush() throws(SystemError) { throw .notSupported }
    func resize(to byteCount: UInt64) throws(SystemError) { throw .notSupported }
}

extension SystemError {
    /// Bytes of a pipe that came too long ago.
    static let gone = SystemError(code: ESPIPE)
    /// Bytes that a pipe should have had.
    static let missing = SystemError(code: ENODATA)
    static let cancelled = SystemError(code: ECANCELED)
}
