internal import Glibc

/// Memory that belongs to one worker thread for as long as the thread lives.
struct Scratch {
    /// The largest request libfuse hands over: 256 pages.
    static let byteCount = 1 << 20
    /// The longest list that one gathering write takes, less libfuse's own header.
    static let pieceCount = 1000

    /// Room for the data of one request, aligned for O_DIRECT.
    let bytes: UnsafeMutableRawBufferPointer
    /// Room for the list of its pieces.
    let pieces: UnsafeMutableBufferPointer<iovec>

    /// Under which each thread keeps its memory; made by the owner of the threads.
    struct Key: Sendable {
        private let key: pthread_key_t

        init() throws(MountError) {
            var key = pthread_key_t()
            let code = pthread_key_create(&key, { Glibc.free($0) })
            guard code == 0 else { throw MountError("", "no room for the threads' memory") }
            self.key = key
        }

        /// This thread's memory; nil where the system has none left.
        @inline(__always)
        func ofThisThread() -> Scratch? {
            if let memory = pthread_getspecific(key) { return Scratch(memory) }
            return make()
        }

        @inline(never)
        private func make() -> Scratch? {
            let listByteCount = Scratch.pieceCount &* MemoryLayout<iovec>.stride
            guard
                let memory = aligned_alloc(
                    4096, (Scratch.byteCount &+ listByteCount &+ 4095) & ~4095)
            else { return nil }
            guard pthread_setspecific(key, memory) == 0 else {
                Glibc.free(memory)
                return nil
            }
            return Scratch(memory)
        }
    }

    @inline(__always)
    init(_ memory: UnsafeMutableRawPointer) {
        bytes = UnsafeMutableRawBufferPointer(start: memory, count: Self.byteCount)
        let list = (memory + Self.byteCount).assumingMemoryBound(to: iovec.self)
        pieces = UnsafeMutableBufferPointer(start: list, count: Self.pieceCount)
    }
}
