internal import Glibc

/// Reads the tables of an image in their order, on threads that are a few tables ahead.
final class TableReader: Sendable {
    private struct State {
        /// How many tables threads have taken to read, and how many were looked at.
        var begun = 0
        var done = 0
        /// Whether a slot's table was read, and what the system said.
        var outcomes: [Result<Void, SystemError>?]
        var isEnded = false
    }

    private let device: any BlockDevice
    private let offsets: [UInt64]
    private let slots: Buffers
    private let state: Monitor<State>

    /// Memory for some tables.
    private struct Buffers: ~Copyable, @unchecked Sendable {
        let count: Int
        private let byteCount: Int
        private let memory: UnsafeMutableRawPointer

        init(count: Int, byteCount: Int) {
            self.count = count
            self.byteCount = byteCount
            memory = .allocate(byteCount: count * byteCount, alignment: 4096)
        }

        deinit { memory.deallocate() }

        /// The memory of table `index`: its own until as many more are begun as there is room for.
        subscript(index: Int) -> UnsafeMutableRawBufferPointer {
            UnsafeMutableRawBufferPointer(
                start: memory + index % count * byteCount, count: byteCount)
        }
    }

    private init(_ device: any BlockDevice, _ offsets: [UInt64], byteCount: Int, ahead: Int) {
        self.device = device
        self.offsets = offsets
        slots = Buffers(count: ahead, byteCount: byteCount)
        state = Monitor(State(outcomes: Array(repeating: nil, count: ahead)))
    }

    /// Calls `body` with each table, in their order, on the caller's thread.
    ///
    /// - Parameters:
    ///   - offsets: where the tables lie; what is past the device's end is zeros.
    ///   - byteCount: bytes of a table.
    ///   - threadCount: how many tables are read at once; at 1 no thread is started.
    /// - Throws: `.system` where a table cannot be read, what `body` throws.
    static func forEach(
        _ offsets: [UInt64], byteCount: Int, of device: any BlockDevice, threadCount: Int,
        _ body: (_ table: UnsafeRawBufferPointer) throws(ImageError) -> Void
    ) throws(ImageError) {
        let threadCount = min(threadCount, offsets.count)
        let reader = TableReader(
            device, offsets, byteCount: byteCount, ahead: threadCount > 1 ? 2 * threadCount : 1)
        let threads = threadCount > 1 ? (0..<threadCount).compactMap { _ in reader.start() } : []
        defer {
            reader.end()
            for thread in threads { pthread_join(thread, nil) }
        }
        for (index, offset) in offsets.enumerated() {
            let outcome = threads.isEmpty ? reader.read(index) : reader.waitFor(index)
            do throws(SystemError) { try outcome.get() } catch {
                throw ImageError(
                    .system(error, operation: "cannot read at offset \(offset)"), file: device.name)
            }
            try body(UnsafeRawBufferPointer(reader.slots[index]))
            reader.finish(index)
        }
    }

    private func start() -> pthread_t? {
        Worker.start {
            while let index = self.next() {
                let outcome = self.read(index)
                self.state.withLock { $0.outcomes[index % self.slots.count] = outcome }
                self.state.announceChange()
            }
        }
    }

    /// The next table to read, as soon as there is room for it; nil at the end.
    private func next() -> Int? {
        state.waitFor { state -> Int?? in
            if state.isEnded || state.begun == self.offsets.count { return .some(nil) }
            guard state.begun - state.done < self.slots.count else { return nil }
            defer { state.begun += 1 }
            return .some(state.begun)
        }
    }

    private func read(_ index: Int) -> Result<Void, SystemError> {
        Result { () throws(SystemError) in
            try device.readPadded(into: slots[index], at: offsets[index])
        }
    }

    private func waitFor(_ index: Int) -> Result<Void, SystemError> {
        state.waitFor { $0.outcomes[index % self.slots.count] }
    }

    private func finish(_ index: Int) {
        state.withLock {
            $0.outcomes[index % self.slots.count] = nil
            $0.done += 1
        }
        state.announceChange()
    }

    private func end() {
        state.withLock { $0.isEnded = true }
        state.announceChange()
    }
}
