import CZlib
import CZstd
import Dispatch
import QCOW2
import Testing

@Suite("Compressed clusters")
struct CompressionTests {
    static let clusterSizes = [512, 4096, 65536, 2 << 20]

    // MARK: deflate

    @Test("A deflate stream fills a cluster of any size", arguments: clusterSizes)
    func deflate(clusterSize: Int) throws {
        let cluster = Noise.text(clusterSize)
        #expect(try inflated(.deflate, deflated(cluster), clusterSize) == cluster)
    }

    @Test("Whatever follows a deflate stream is ignored", arguments: clusterSizes)
    func deflateTail(clusterSize: Int) throws {
        let cluster = Noise.text(clusterSize)
        let stream = deflated(cluster)
        for tail in [[UInt8](repeating: 0, count: 700), Noise.bytes(700)] {
            #expect(try inflated(.deflate, stream + tail, clusterSize) == cluster)
        }
    }

    @Test("A deflate stream that goes on gives its first cluster", arguments: clusterSizes)
    func deflateLonger(clusterSize: Int) throws {
        let content = Noise.text(clusterSize + 1000)
        let stream = deflated(content)
        let decompressor = Decompressor(.deflate)
        for _ in 0..<3 {  // the slow path's decoder is reused too
            let result = try inflated(decompressor, stream, clusterSize)
            #expect(result == Array(content[..<clusterSize]))
        }
    }

    @Test("Stored blocks longer than a cluster are read", arguments: clusterSizes)
    func deflateStored(clusterSize: Int) throws {
        let content = Noise.bytes(clusterSize * 2)
        let stream = deflated(content, level: 0)
        #expect(try inflated(.deflate, stream, clusterSize) == Array(content[..<clusterSize]))
    }

    @Test("Distances beyond 4 KiB are read, as QEMU does")
    func deflateLongDistance() throws {
        let piece = Noise.bytes(20_000)
        let cluster = piece + piece + piece + [UInt8](repeating: 7, count: 65536 - 60_000)
        let stream = deflated(cluster, windowBits: 15)
        #expect(stream.count < 40_000)
        #expect(try inflated(.deflate, stream, 65536) == cluster)
    }

    @Test("A zlib header is refused", arguments: clusterSizes)
    func deflateHeader(clusterSize: Int) {
        let stream = [0x78, 0x9c] + deflated(Noise.text(clusterSize))
        #expect(throws: DecompressionError.self) { try inflated(.deflate, stream, clusterSize) }
    }

    @Test("A deflate stream that ends too early is refused", arguments: clusterSizes)
    func deflateShort(clusterSize: Int) {
        let stream = deflated(Noise.text(clusterSize - 1)) + [0, 0, 0, 0]
        #expect(throws: DecompressionError.short(byteCount: clusterSize - 1)) {
            try inflated(.deflate, stream, clusterSize)
        }
        #expect(throws: DecompressionError.short(byteCount: 0)) {
            try inflated(.deflate, [], clusterSize)
        }
    }

    @Test("A deflate stream that is cut is refused", arguments: clusterSizes)
    func deflateCut(clusterSize: Int) {
        let stream = deflated(Noise.text(clusterSize))
        for count in [1, stream.count / 2, stream.count - 16] {
            #expect(throws: DecompressionError.self) {
                try inflated(.deflate, Array(stream[..<count]), clusterSize)
            }
        }
    }

    @Test("A deflate stream without its final block is refused", arguments: clusterSizes)
    func deflateUnfinished(clusterSize: Int) {
        let stream = deflated(Noise.text(clusterSize), finishing: Z_SYNC_FLUSH)
        #expect(throws: DecompressionError.damaged) {
            try inflated(.deflate, stream + [UInt8](repeating: 0, count: 512), clusterSize)
        }
    }

    @Test("A deflate stream that ends where the cluster is full is read, as QEMU does")
    func deflateFull() throws {
        let cluster = Noise.text(4096)
        let stream = deflated(cluster, finishing: Z_SYNC_FLUSH)
        #expect(try inflated(.deflate, stream, 4096) == cluster)
    }

    // MARK: zstd

    @Test("A zstd frame fills a cluster of any size", arguments: clusterSizes)
    func zstd(clusterSize: Int) throws {
        let cluster = Noise.text(clusterSize)
        for namesSize in [true, false] {
            let stream = zstandard(cluster, namesSize: namesSize)
            #expect(try inflated(.zstd, stream, clusterSize) == cluster)
            #expect(try inflated(.zstd, stream + Noise.bytes(900), clusterSize) == cluster)
            #expect(try inflated(.zstd, stream + [0, 0, 0, 0, 0, 0], clusterSize) == cluster)
        }
    }

    @Test("Several frames, empty and skippable ones among them, fill a cluster together")
    func zstdFrames() throws {
        let cluster = Noise.text(65536)
        let skippable: [UInt8] = [0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]
        let stream =
            skippable + zstandard(Array(cluster[..<10_000])) + zstandard([]) + skippable
            + zstandard(Array(cluster[10_000...]), namesSize: false)
        #expect(try inflated(.zstd, stream, 65536) == cluster)
    }

    @Test("A frame that yields too little or too much is refused", arguments: clusterSizes)
    func zstdLength(clusterSize: Int) {
        for namesSize in [true, false] {
            let short = zstandard(Noise.text(clusterSize - 1), namesSize: namesSize)
            #expect(throws: DecompressionError.short(byteCount: clusterSize - 1)) {
                try inflated(.zstd, short, clusterSize)
            }
            let long = zstandard(Noise.text(clusterSize + 1), namesSize: namesSize)
            #expect(throws: DecompressionError.long) { try inflated(.zstd, long, clusterSize) }
        }
    }

    @Test("A content checksum is verified")
    func zstdChecksum() throws {
        let cluster = Noise.text(4096)
        var stream = zstandard(cluster, hasChecksum: true)
        #expect(try inflated(.zstd, stream, 4096) == cluster)
        stream[stream.count - 1] ^= 1
        #expect(throws: DecompressionError.damaged) { try inflated(.zstd, stream, 4096) }
    }

    @Test("A window of 128 MiB is the largest")
    func zstdWindow() throws {
        let cluster = Noise.text(65536)
        var stream = zstandard(cluster, namesSize: false)
        try #require(stream[4] & 0x20 == 0, "a frame with a window descriptor")
        stream[5] = (27 - 10) << 3
        #expect(try inflated(.zstd, stream, 65536) == cluster)
        stream[5] += 1
        #expect(throws: DecompressionError.windowTooLarge(byteCount: (1 << 27) + (1 << 24))) {
            try inflated(.zstd, stream, 65536)
        }
        stream[5] = 0xff
        #expect(throws: DecompressionError.self) { try inflated(.zstd, stream, 65536) }
    }

    // MARK: both

    @Test("Hostile bytes are refused or read, and never crash", arguments: [UInt64(1), 2, 3])
    func hostile(seed: UInt64) {
        var noise = Noise(seed: seed)
        let cluster = Noise.text(4096)
        let frame = zstandard(cluster, namesSize: false)
        for (method, valid) in [(Decompressor.Method.deflate, deflated(cluster)), (.zstd, frame)] {
            let decompressor = Decompressor(method)
            for length in 0..<valid.count {
                _ = try? inflated(decompressor, Array(valid[..<length]), 4096)
            }
            for _ in 0..<3000 {
                var bytes = valid
                for _ in 0...Int.random(in: 0..<4, using: &noise) {
                    bytes[Int.random(in: 0..<bytes.count, using: &noise)] =
                        .random(in: 0...255, using: &noise)
                }
                _ = try? inflated(decompressor, bytes, 4096)
                let wild = Noise.bytes(Int.random(in: 0..<300, using: &noise), seed: noise.next())
                _ = try? inflated(decompressor, wild, 4096)
                _ = try? inflated(decompressor, [0x28, 0xb5, 0x2f, 0xfd] + wild, 4096)
            }
            #expect((try? inflated(decompressor, valid, 4096)) == cluster, "seed \(seed)")
        }
    }

    @Test("Threads share a decompressor", arguments: [Decompressor.Method.deflate, .zstd])
    func threads(method: Decompressor.Method) {
        let clusters = (1...8).map { Noise.text(65536, seed: $0) }
        let streams = clusters.map { method == .deflate ? deflated($0) : zstandard($0) }
        let decompressor = Decompressor(method)
        DispatchQueue.concurrentPerform(iterations: 24) { thread in
            for round in 0..<50 {
                let index = (thread + round) % 8
                let result = try? inflated(decompressor, streams[index], 65536)
                #expect(result == clusters[index])
            }
        }
    }

    @Test("A stream buffer has the length asked for", arguments: [1, 4096, 128 << 10, 4 << 20])
    func streamBuffer(byteCount: Int) {
        let decompressor = Decompressor(.deflate)
        for _ in 0..<3 {
            let count = decompressor.withStreamBuffer(byteCount: byteCount) { buffer in
                buffer.initializeMemory(as: UInt8.self, repeating: 1)
                return buffer.count
            }
            #expect(count == byteCount)
        }
    }
}

// MARK: - Making streams

private func inflated(
    _ method: Decompressor.Method, _ stream: [UInt8], _ clusterSize: Int
) throws(DecompressionError) -> [UInt8] {
    try inflated(Decompressor(method), stream, clusterSize)
}

private func inflated(
    _ decompressor: borrowing Decompressor, _ stream: [UInt8], _ clusterSize: Int
) throws(DecompressionError) -> [UInt8] {
    // Memory of exactly the stream's length, so that a tool which watches memory sees an overrun.
    let source = UnsafeMutableRawBufferPointer.allocate(byteCount: stream.count, alignment: 1)
    defer { source.deallocate() }
    source.copyBytes(from: stream)
    let target = UnsafeMutableRawBufferPointer.allocate(byteCount: clusterSize, alignment: 1)
    defer { target.deallocate() }
    try decompressor.decompress(UnsafeRawBufferPointer(source), into: target)
    return Array(target)
}

private func deflated(
    _ content: [UInt8], level: Int32 = 6, windowBits: Int32 = 12, finishing: Int32 = Z_FINISH
) -> [UInt8] {
    var stream = z_stream()
    #expect(qcowfs_deflate_init(&stream, level, windowBits) == Z_OK)
    defer { deflateEnd(&stream) }
    var input = content
    var output = [UInt8](repeating: 0, count: content.count + content.count / 8 + 1000)
    input.withUnsafeMutableBufferPointer { source in
        output.withUnsafeMutableBufferPointer { target in
            stream.next_in = source.baseAddress
            stream.avail_in = UInt32(source.count)
            stream.next_out = target.baseAddress
            stream.avail_out = UInt32(target.count)
            let result = deflate(&stream, finishing)
            #expect(result == (finishing == Z_FINISH ? Z_STREAM_END : Z_OK))
        }
    }
    return Array(output.prefix(Int(stream.total_out)))
}

private func zstandard(
    _ content: [UInt8], namesSize: Bool = true, hasChecksum: Bool = false
) -> [UInt8] {
    let context = ZSTD_createCCtx()
    defer { ZSTD_freeCCtx(context) }
    ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, namesSize ? 1 : 0)
    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, hasChecksum ? 1 : 0)
    var output = [UInt8](repeating: 0, count: ZSTD_compressBound(content.count))
    let count = ZSTD_compress2(context, &output, output.count, content, content.count)
    #expect(ZSTD_isError(count) == 0)
    return Array(output.prefix(count))
}

/// Repeatable random bytes (SplitMix64).
struct Noise: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var word = (state ^ (state >> 30)) &* 0xbf58_476d_1ce4_e5b9
        word = (word ^ (word >> 27)) &* 0x94d0_49bb_1331_11eb
        return word ^ (word >> 31)
    }

    static func bytes(_ count: Int, seed: UInt64 = 1) -> [UInt8] {
        var noise = Noise(seed: seed)
        return (0..<count).map { _ in UInt8(truncatingIfNeeded: noise.next()) }
    }

    /// Bytes that compress about two to one.
    static func text(_ count: Int, seed: Int = 1) -> [UInt8] {
        bytes(count, seed: UInt64(seed)).map { 97 + $0 % 16 }
    }
}
