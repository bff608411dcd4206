/// Pages of refcount blocks in memory, as they are on disk, dirty ones among them.
///
/// A page is 4 KiB of a block, or the whole of a smaller one.  A dirty page may be written at any
/// time: a count in memory is never below the references on disk, because it falls only after the
/// reference is durably gone.  Used under the lock of the allocator.
package struct RefcountCache: ~Copyable {
    private let file: HostFile
    let pageByteCount: Int
    private let capacity: Int
    private var memory: UnsafeMutableRawBufferPointer
    private var slots: [Slot] = []
    private var slotOfPage: [UInt64: Int] = [:]
    private var hand = 0

    private struct Slot {
        var page: UInt64
        /// Host offset of the page.
        var offset: UInt64
        var isDirty = false
        var wasUsed = true
    }

    package init(file: HostFile, pageByteCount: Int, byteCount: Int) {
        self.file = file
        self.pageByteCount = pageByteCount
        capacity = max(byteCount / pageByteCount, 8)
        memory = .allocate(byteCount: capacity * pageByteCount, alignment: 4096)
    }

    deinit { memory.deallocate() }

    /// The bytes of `page`, which lies at `offset`; valid until the next call.
    package mutating func bytes(
        of page: UInt64, at offset: UInt64
    ) throws(ImageError) -> UnsafeMutableRawBufferPointer {
        if let slot = slotOfPage[page] {
            slots[slot].wasUsed = true
            return room(slot)
        }
        let slot = try emptySlot()
        try file.read(into: room(slot), at: offset)
        occupy(slot, page, offset)
        return room(slot)
    }

    /// `page` is in memory and was changed.
    package mutating func markDirty(_ page: UInt64) {
        if let slot = slotOfPage[page] { slots[slot].isDirty = true }
    }

    /// Drops what is in memory of `pages`, whose block is none any more.
    package mutating func forget(_ pages: Range<UInt64>) {
        for (page, slot) in slotOfPage where pages.contains(page) {
            slotOfPage[page] = nil
            slots[slot].page = .max
            slots[slot].isDirty = false
        }
    }

    package var hasDirtyPages: Bool { slots.contains { $0.isDirty } }

    /// Writes the dirty page with the lowest number from `page` on, and returns its number; nil
    /// when none is dirty.  An error leaves it dirty.
    package mutating func writeDirtyPage(from page: UInt64) throws(ImageError) -> UInt64? {
        var best: Int?
        for slot in slots.indices where slots[slot].isDirty && slots[slot].page >= page {
            if let found = best, slots[found].page < slots[slot].page { continue }
            best = slot
        }
        guard let slot = best else { return nil }
        try write(slot)
        return slots[slot].page
    }

    private mutating func write(_ slot: Int) throws(ImageError) {
        try file.write(UnsafeRawBufferPointer(room(slot)), at: slots[slot].offset)
        slots[slot].isDirty = false
    }

    private func room(_ slot: Int) -> UnsafeMutableRawBufferPointer {
        UnsafeMutableRawBufferPointer(
            rebasing: memory[slot * pageByteCount..<(slot + 1) * pageByteCount])
    }

    private mutating func occupy(_ slot: Int, _ page: UInt64, _ offset: UInt64) {
        let entry = Slot(page: page, offset: offset)
        if slot == slots.count { slots.append(entry) } else { slots[slot] = entry }
        slotOfPage[page] = slot
    }

    /// A slot to fill, made empty where all are taken.  An error leaves the cache as it was.
    private mutating func emptySlot() throws(ImageError) -> Int {
        if slots.count < capacity { return slots.count }
        while true {
            hand = (hand + 1) % capacity
            if slots[hand].wasUsed {
                slots[hand].wasUsed = false
                continue
            }
            if slots[hand].isDirty { try write(hand) }
            slotOfPage[slots[hand].page] = nil
            slots[hand].page = .max
            return hand
        }
    }
}
