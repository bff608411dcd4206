/// A closed transaction: frozen copies of all that it will write, and what it drops.
///
/// Nothing in here changes any more, whatever later transactions do; a commit that failed is
/// tried again from these bytes.
struct Transaction: Sendable {
    let generation: UInt64
    let map: FrozenMap
    let refcounts: ClusterAllocator.Frozen
    let header: [UInt8]?
    /// Whether phase 1 has something that must be durable before phase 2.
    var needsFirstSync: Bool
}
