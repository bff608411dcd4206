internal import Synchronization

/// Idle decoder contexts, or idle buffers: taken and given back from any thread without a lock.
///
/// At most `capacity` of them lie idle; one more that comes back is destroyed.  How many exist at
/// once is therefore bounded by the threads at work plus `capacity`.
struct ContextPool: ~Copyable, @unchecked Sendable {
    // `@unchecked`: the memory is ours alone, and holds nothing but atomics.
    private static var capacity: Int { 16 }

    private let slots: UnsafeMutablePointer<Atomic<UnsafeMutableRawPointer?>>
    private let destroy: @Sendable (UnsafeMutableRawPointer) -> Void

    init(destroying destroy: @escaping @Sendable (UnsafeMutableRawPointer) -> Void) {
        slots = .allocate(capacity: Self.capacity)
        for index in 0..<Self.capacity { (slots + index).initialize(to: Atomic(nil)) }
        self.destroy = destroy
    }

    /// Destroys all that lie idle.
    borrowing func drain() {
        while let context = take() { destroy(context) }
    }

    deinit {
        drain()
        slots.deinitialize(count: Self.capacity)
        slots.deallocate()
    }

    /// An idle context, which is the caller's from now on, or nil where none is idle.
    borrowing func take() -> UnsafeMutableRawPointer? {
        for index in 0..<Self.capacity {
            // A look before the exchange: an empty slot's cache line stays shared.
            guard slots[index].load(ordering: .relaxed) != nil else { continue }
            // Pairs with the store in `give`: what its last user did to the context is visible.
            if let context = slots[index].exchange(nil, ordering: .acquiring) { return context }
        }
        return nil
    }

    /// Lets go of a context that `take` returned, or of a new one.
    borrowing func give(_ context: UnsafeMutableRawPointer) {
        for index in 0..<Self.capacity {
            let (exchanged, _) = slots[index].compareExchange(
                expected: nil, desired: context, ordering: .releasing)
            if exchanged { return }
        }
        destroy(context)
    }
}
