import Synchronization

/// What a dirty bitmap must mark.
final class BitmapModel: Sendable {
    let name: String
    let granularity: Int
    private let state: Mutex<State>

    private struct State {
        var isEnabled = true
        var diskByteCount: Int
        /// Numbers of the granules that are marked.
        var granules: Set<Int> = []
    }

    /// A bitmap that records, and marks nothing.
    init(_ name: String, granularity: Int, diskByteCount: Int) {
        self.name = name
        self.granularity = granularity
        state = Mutex(State(diskByteCount: diskByteCount))
    }

    var isEnabled: Bool { state.withLock { $0.isEnabled } }

    func disable() { state.withLock { $0.isEnabled = false } }

    /// A range of the disk may have changed.
    func note(_ range: Range<Int>) {
        guard !range.isEmpty else { return }
        let granularity = granularity
        state.withLock { state in
            guard state.isEnabled else { return }
            state.granules.formUnion(
                range.lowerBound / granularity...(range.upperBound - 1) / granularity)
        }
    }

    /// The disk has another size: what it lost is forgotten, what it gained has changed.
    func resize(to byteCount: Int) {
        let granularity = granularity
        let old = state.withLock { state in
            defer { state.diskByteCount = byteCount }
            state.granules = state.granules.filter { $0 * granularity < byteCount }
            return state.diskByteCount
        }
        if byteCount > old { note(old..<byteCount) }
    }

    /// The disk was replaced by another one.
    func replaceDisk(byteCount: Int) {
        resize(to: byteCount)
        note(0..<byteCount)
    }

    /// The numbers of the marked granules, ascending.
    var marked: [Int] { state.withLock { $0.granules.sorted() } }

    /// The marked ranges of the disk, ascending, neighbours joined.
    var ranges: [Range<Int>] {
        let end = state.withLock { $0.diskByteCount }
        return FixtureTests.joined(
            marked.map { $0 * granularity..<min(($0 + 1) * granularity, end) })
    }
}
