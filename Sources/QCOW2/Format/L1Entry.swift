/// One entry of an L1 table.
///
/// | bits  | meaning                                                             |
/// |-------|---------------------------------------------------------------------|
/// | 0–8   | reserved, 0                                                         |
/// | 9–55  | host offset of the L2 table, cluster aligned; 0: none, unallocated  |
/// | 56–62 | reserved, 0                                                         |
/// | 63    | COPIED: the L2 table has exactly one reference; active table only   |
package struct L1Entry: Equatable, Sendable {
    package var bits: UInt64

    @inline(__always) package init(bits: UInt64) { self.bits = bits }

    /// An entry for an L2 table at `offset` that has exactly one reference.
    @inline(__always) package init(copiedTableAt offset: UInt64) { bits = offset | L1Entry.copied }

    static let copied: UInt64 = 1 << 63
    static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00

    @inline(__always) package var offset: UInt64 { bits & L1Entry.offsetMask }
    @inline(__always) package var isCopied: Bool { bits & L1Entry.copied != 0 }
    /// The same entry in a table that is not active, where COPIED has no meaning.
    package var withoutCopied: L1Entry { L1Entry(bits: bits & ~L1Entry.copied) }
    /// What must be 0 and is not: nothing is changed behind such an entry.
    package var reservedBits: UInt64 { bits & L1Entry.reservedMask }
    private static var reservedMask: UInt64 { ~(offsetMask | copied) }
    /// Whether the table is ours alone, and nothing unknown is said of it.
    @inline(__always) package var isCopiedAndKnown: Bool {
        bits & (L1Entry.copied | L1Entry.reservedMask) == L1Entry.copied
    }
}
