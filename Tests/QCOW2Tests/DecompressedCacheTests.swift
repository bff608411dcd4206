import Dispatch
import QCOW2
import Synchronization
import Testing

@Suite("The cache of decompressed clusters")
struct DecompressedCacheTests {
    private struct Refused: Error {}

    @Test("A cluster is inflated once, and its parts are copied out")
    func hit() throws {
        let shelf = try Shelf(byteCount: 1 << 20)
        for offset in [0, 4096, 65535, 65536] {
            #expect(shelf.holds(key(at: 512), from: offset, count: min(4096, 65536 - offset)))
        }
        #expect(shelf.fillCount == 1)
    }

    @Test("Layer, place and length together name a stream")
    func keys() throws {
        let shelf = try Shelf(byteCount: 4 << 20)
        let keys = [
            key(at: 512), key(at: 513), key(at: 512, byteCount: 1024), key(at: 512, layer: 1),
            key(at: 512, layer: 200), key(at: 1 << 55, layer: 200),
        ]
        for _ in 0..<2 { for key in keys { #expect(shelf.holds(key)) } }
        #expect(shelf.fillCount == keys.count)
    }

    @Test("A failure is thrown on and not remembered")
    func failure() throws {
        let shelf = try Shelf(byteCount: 1 << 20)
        for _ in 0..<2 {
            #expect(throws: Refused.self) {
                try withBytes(4096) { target throws(Refused) in
                    try shelf.cache.copy(
                        key(at: 512).key, clusterByteCount: 65536, from: 0, into: target
                    ) { _ throws(Refused) in throw Refused() }
                }
            }
        }
        #expect(shelf.holds(key(at: 512)))
        #expect(shelf.fillCount == 1)
    }

    @Test("The bytes are bounded, and what is read again stays")
    func bound() throws {
        let shelf = try Shelf(byteCount: 8 * 65536)
        for round in 0..<50 {
            #expect(shelf.holds(key(at: 1)))
            #expect(shelf.holds(key(at: UInt64(1000 + round))))
        }
        #expect(shelf.fillCount == 51)
    }

    @Test("Two clusters of 2 MiB fit whatever the bound is, and 0 is off")
    func extremes() throws {
        let tiny = try Shelf(byteCount: 1, clusterSize: 2 << 20)
        for _ in 0..<3 { for place in [UInt64(1), 2] { #expect(tiny.holds(key(at: place))) } }
        #expect(tiny.fillCount == 2)
        let off = try Shelf(byteCount: 0)
        for _ in 0..<3 {
            #expect(off.holds(key(at: 1)))
            #expect(off.holds(key(at: 1), from: 0, count: 65536))
        }
        #expect(off.fillCount == 6)
    }

    @Test("A layer with larger clusters than the cache was made for is read past it")
    func largerClusters() throws {
        let shelf = try Shelf(byteCount: 1 << 20, clusterSize: 4096)
        #expect(shelf.holds(key(at: 1), from: 5000, count: 100, clusterSize: 65536))
        #expect(shelf.holds(key(at: 1), from: 5000, count: 100, clusterSize: 65536))
        #expect(shelf.fillCount == 2)
    }

    @Test("Streams that touch a freed host range are forgotten, the others stay")
    func forget() throws {
        let shelf = try Shelf(byteCount: 2 << 20)
        shelf.cache.forget(layer: 0, hostRange: 0..<UInt64.max)
        let touching = [key(at: 65536), key(at: 65535, byteCount: 2), key(at: 131071)]
        let others = [
            key(at: 65535, byteCount: 1), key(at: 131072), key(at: 65536, layer: 1), key(at: 1),
        ]
        for key in touching + others { #expect(shelf.holds(key)) }
        shelf.cache.forget(layer: 0, hostRange: 65536..<131072)
        let before = shelf.fillCount
        for key in others { #expect(shelf.holds(key)) }
        #expect(shelf.fillCount == before)
        for key in touching { #expect(shelf.holds(key)) }
        #expect(shelf.fillCount == before + touching.count)
    }

    @Test("With every slot in use a cluster is inflated aside")
    func allInUse() throws {
        let shelf = try Shelf(byteCount: 2 * 65536)
        // Inside of a fill its slot is taken: three at once do not fit.
        shelf.whileFilling(key(at: 1)) {
            shelf.whileFilling(key(at: 2)) {
                #expect(shelf.holds(key(at: 3)))
                #expect(shelf.holds(key(at: 3), from: 0, count: 65536))
            }
        }
        #expect(shelf.holds(key(at: 1)))
        #expect(shelf.holds(key(at: 2)))
        #expect(shelf.fillCount == 4)
    }

    @Test("Readers of one cluster wait for one fill, readers of others do not")
    func waiting() throws {
        let shelf = try Shelf(byteCount: 1 << 20)
        let started = DispatchSemaphore(value: 0)
        let finish = DispatchSemaphore(value: 0)
        let readers = DispatchGroup()
        DispatchQueue.global().async(group: readers) {
            shelf.whileFilling(key(at: 1)) {
                started.signal()
                finish.wait()
            }
        }
        started.wait()
        for _ in 0..<3 {
            DispatchQueue.global().async(group: readers) { #expect(shelf.holds(key(at: 1))) }
        }
        #expect(shelf.holds(key(at: 2)))
        finish.signal()
        readers.wait()
        #expect(shelf.fillCount == 2)
    }

    @Test("A cluster that is forgotten while it is filled is not found afterwards")
    func forgottenFill() throws {
        let shelf = try Shelf(byteCount: 1 << 20)
        shelf.whileFilling(key(at: 700)) { shelf.cache.forget(layer: 0, hostRange: 512..<1024) }
        #expect(shelf.holds(key(at: 700)))
        #expect(shelf.fillCount == 2)
    }

    @Test("Threads that read, evict, fail and forget never get another cluster's bytes")
    func hammer() throws {
        let shelf = try Shelf(byteCount: 20 * 4096, clusterSize: 4096)
        let wrong = Atomic<Int>(0)
        DispatchQueue.concurrentPerform(iterations: 8) { thread in
            var noise = Noise(seed: UInt64(thread))
            for round in 0..<6000 {
                let place = UInt64.random(in: 1...40, using: &noise) * 100
                let layer = Int.random(in: 0...1, using: &noise)
                let offset = Int.random(in: 0..<4000, using: &noise)
                if !shelf.holds(key(at: place, layer: layer), from: offset, count: 96) {
                    wrong.wrappingAdd(1, ordering: .relaxed)
                }
                if round % 97 == 0 {
                    shelf.cache.forget(layer: layer, hostRange: place..<place + 200)
                    try? shelf.failing(key(at: place))
                }
            }
        }
        #expect(wrong.load(ordering: .relaxed) == 0)
    }
}

/// A cache whose clusters hold a pattern of their key.
private final class Shelf: Sendable {
    struct Stream { var key: DecompressedCache.Key, seed: UInt64 }
    struct Refused: Error {}

    let cache: DecompressedCache
    let clusterSize: Int
    private let fills = Atomic<Int>(0)
    var fillCount: Int { fills.load(ordering: .relaxed) }

    init(byteCount: Int, clusterSize: Int = 65536) throws {
        cache = try DecompressedCache(byteCount: byteCount, clusterByteCount: clusterSize)
        self.clusterSize = clusterSize
    }

    /// Whether a read through the cache gives the stream's own bytes.
    func holds(
        _ stream: Stream, from offset: Int = 0, count: Int = 64, clusterSize: Int? = nil,
        whileFilling action: () -> Void = {}
    ) -> Bool {
        withBytes(count) { target in
            cache.copy(
                stream.key, clusterByteCount: clusterSize ?? self.clusterSize, from: offset,
                into: target
            ) { cluster in
                fills.wrappingAdd(1, ordering: .relaxed)
                action()
                for index in cluster.indices { cluster[index] = Self.byte(index, of: stream) }
            }
            return target.indices.allSatisfy { target[$0] == Self.byte(offset + $0, of: stream) }
        }
    }

    func whileFilling(_ stream: Stream, _ action: () -> Void) {
        let isRight = holds(stream, whileFilling: action)
        #expect(isRight)
    }

    func failing(_ stream: Stream) throws(Refused) {
        try withBytes(64) { target throws(Refused) in
            try cache.copy(
                stream.key, clusterByteCount: clusterSize, from: 0, into: target
            ) { cluster throws(Refused) in
                cluster[0] = ~Self.byte(0, of: stream)
                throw Refused()
            }
        }
    }

    private static func byte(_ index: Int, of stream: Stream) -> UInt8 {
        UInt8(((stream.seed &+ UInt64(index / 64)) &* 0x9e37_79b9_7f4a_7c15) >> 56)
    }
}

private func key(at place: UInt64, byteCount: Int = 100, layer: Int = 0) -> Shelf.Stream {
    Shelf.Stream(
        key: DecompressedCache.Key(layer: layer, hostOffset: place, byteCount: byteCount),
        seed: place << 20 ^ UInt64(byteCount) << 8 ^ UInt64(layer))
}

private func withBytes<Result, Failure>(
    _ count: Int, _ body: (UnsafeMutableRawBufferPointer) throws(Failure) -> Result
) throws(Failure) -> Result {
    let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: 8)
    defer { bytes.deallocate() }
    return try body(bytes)
}
