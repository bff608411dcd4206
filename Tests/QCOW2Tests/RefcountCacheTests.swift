import QCOW2
import Synchronization
import TestSupport
import Testing

/// Eight pages of 512 bytes in memory; page N lies at byte `512 * N` of a file, and is full of N.
@Suite("Refcount blocks in memory")
struct RefcountCacheTests {
    private let device: CountingDevice
    private let file: HostFile

    init() throws {
        let bytes = (0..<32).flatMap { [UInt8](repeating: UInt8($0), count: 512) }
        device = CountingDevice(RecordingDevice(bytes, yielding: false))
        file = try HostFile(device)
    }

    private func cache(byteCount: Int = 0) -> RefcountCache {
        RefcountCache(file: file, pageByteCount: 512, byteCount: byteCount)
    }

    /// The first byte of a page.
    private func look(_ page: UInt64, _ cache: inout RefcountCache) throws -> UInt8 {
        try cache.bytes(of: page, at: page * 512)[0]
    }

    private func change(_ page: UInt64, to byte: UInt8, _ cache: inout RefcountCache) throws {
        try cache.bytes(of: page, at: page * 512)[0] = byte
        cache.markDirty(page)
    }

    private func stored(_ page: UInt64) throws -> UInt8 {
        var byte: UInt8 = 0
        _ = try withUnsafeMutableBytes(of: &byte) { try device.base.read(into: $0, at: page * 512) }
        return byte
    }

    @Test("A page is read once, as long as it stays", arguments: [(0, 8), (10 * 512, 10)])
    func capacity(byteCount: Int, pageCount: UInt64) throws {
        var cache = cache(byteCount: byteCount)
        for _ in 0..<2 {
            for page in 0..<pageCount { #expect(try look(page, &cache) == UInt8(page)) }
        }
        #expect(device.readCount == Int(pageCount))
        #expect(try look(pageCount, &cache) == UInt8(pageCount))
        #expect(device.readCount == Int(pageCount) + 1)
        #expect(cache.hasDirtyPages == false)
    }

    @Test("Of the pages that were not used lately the next one leaves")
    func clock() throws {
        var cache = cache()
        for page in 0..<8 as Range<UInt64> { _ = try look(page, &cache) }
        // All were used: page 1 goes, behind the hand.  Then 2 is used, and 3 goes.
        _ = try look(8, &cache)
        _ = try look(2, &cache)
        _ = try look(9, &cache)
        let before = device.readCount
        for page in [0, 2, 4, 5, 6, 7, 8, 9] as [UInt64] {
            #expect(try look(page, &cache) == UInt8(page))
        }
        #expect(device.readCount == before)
        _ = try look(3, &cache)
        #expect(device.readCount == before + 1)
    }

    @Test("A changed page is written before it leaves, and lies where it lay")
    func evicted() throws {
        var cache = cache()
        for page in 0..<8 as Range<UInt64> { try change(page, to: 100 + UInt8(page), &cache) }
        _ = try look(8, &cache)
        #expect(try stored(1) == 101 && stored(0) == 0 && stored(2) == 2)
        #expect(cache.hasDirtyPages == true)
        #expect(try look(1, &cache) == 101)
    }

    @Test("Changed pages are written once, in their order")
    func written() throws {
        var cache = cache()
        for page in [5, 3, 7] as [UInt64] { try change(page, to: 200, &cache) }
        _ = try look(4, &cache)
        #expect(try cache.writeDirtyPage(from: 4) == 5)
        #expect(try cache.writeDirtyPage(from: 0) == 3)
        #expect(try cache.writeDirtyPage(from: 0) == 7)
        #expect(try cache.writeDirtyPage(from: 0) == nil)
        #expect(try [3, 4, 5, 7].map { try stored($0) } == [200, 4, 200, 200])
        cache.markDirty(30)
        #expect(cache.hasDirtyPages == false)
    }

    @Test("A page that could not be read is not there")
    func unread() throws {
        var cache = cache()
        _ = try look(1, &cache)
        device.fails = true
        #expect(throws: ImageError.self) { try cache.bytes(of: 2, at: 1024).count }
        device.fails = false
        #expect(try look(2, &cache) == 2)
        #expect(try look(1, &cache) == 1)
    }

    @Test("A page that is forgotten is read again, and what was changed in it is not written")
    func forgotten() throws {
        var cache = cache()
        for page in [9, 5, 6] as [UInt64] { try change(page, to: 77, &cache) }
        cache.forget(5..<6)
        cache.markDirty(5)
        #expect(try cache.writeDirtyPage(from: 0) == 6)
        #expect(try cache.writeDirtyPage(from: 7) == 9)
        #expect(try cache.writeDirtyPage(from: 0) == nil)
        #expect(try stored(5) == 5)
        #expect(try look(5, &cache) == 5)
        // The room that it had is taken by another one, and nothing happens to the new one.
        try change(5, to: 55, &cache)
        for page in [10, 11, 12, 13, 14] as [UInt64] { _ = try look(page, &cache) }
        #expect(try look(5, &cache) == 55)
        #expect(try stored(5) == 5)
    }
}

private final class CountingDevice: ForwardingDevice {
    let base: any BlockDevice
    private let reads = Atomic(0)
    private let isBroken = Atomic(false)

    init(_ base: any BlockDevice) { self.base = base }

    var readCount: Int { reads.load(ordering: .relaxed) }
    var fails: Bool {
        get { isBroken.load(ordering: .relaxed) }
        set { isBroken.store(newValue, ordering: .relaxed) }
    }

    func read(
        into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(SystemError) -> Int {
        reads.add(1, ordering: .relaxed)
        if fails { throw .inputOutput }
        return try base.read(into: buffer, at: offset)
    }
}
