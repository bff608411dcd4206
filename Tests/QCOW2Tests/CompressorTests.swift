import CZlib
import Foundation
import QCOW2
import TestSupport
import Testing

@Suite("Compressing clusters")
struct CompressorTests {
    static let clusterSizes = [512, 1024, 4096, 65536, 2 << 20]

    @Test(
        "A cluster of any size and content comes back from a decoder with a window of 4 KiB",
        arguments: clusterSizes, CompressionEffort.allCases)
    func roundTrip(clusterSize: Int, effort: CompressionEffort) {
        let compressor = Compressor(.deflate, effort: effort)
        for (name, content) in Self.contents(clusterSize) {
            guard let stream = compressor.stream(of: content) else {
                #expect(name == "noise", "\(name) is stored as it is")
                continue
            }
            #expect(stream.count < clusterSize)
            #expect(strictlyInflated(stream) == content, "\(name) of \(clusterSize) bytes")
        }
    }

    private static func contents(_ size: Int) -> [(String, [UInt8])] {
        let far = Noise.bytes(4095)
        return [
            ("zeros", [UInt8](repeating: 0, count: size)),
            ("text", Noise.text(size)),
            ("noise", Noise.bytes(size)),
            ("two bytes", (0..<size).map { UInt8($0 & 1) }),
            ("one match", [UInt8](0...255) + [UInt8](repeating: 9, count: size - 256)),
            // The window's edge: a repetition every 4095, 4096 and 4097 bytes, and text between.
            ("as far as can be", repeated(far + [1], size)),
            ("just too far", repeated(far + [1, 2], size)),
            ("one byte less", repeated(far, size)),
            // Codes for more than a decade of frequencies: too long, if they are not cut.
            ("rare symbols", fibonacci(size)),
            // Blocks of which one alone is better off without a code.
            ("halves", Noise.bytes(size / 2) + [UInt8](repeating: 5, count: size - size / 2)),
        ].filter {
            size > 4096 || !["as far as can be", "just too far", "one byte less"].contains($0.0)
        }
    }

    private static func repeated(_ piece: [UInt8], _ count: Int) -> [UInt8] {
        (0..<count).map { piece[$0 % piece.count] }
    }

    private static func fibonacci(_ count: Int) -> [UInt8] {
        var bytes: [UInt8] = []
        var (frequency, next) = (1, 1)
        for symbol in UInt8(0)... {
            guard bytes.count < count else { break }
            bytes += [UInt8](repeating: symbol, count: min(frequency, count - bytes.count))
            (frequency, next) = (next, frequency + next)
        }
        var noise = Noise(seed: 7)
        return bytes.shuffled(using: &noise)
    }

    @Test("Random mixtures come back, whatever their length and the cluster before")
    func random() {
        let seed = TestEnvironment.seed
        var noise = Noise(seed: seed)
        let compressor = Compressor(.deflate)
        for round in 0..<(TestEnvironment.isLong ? 20_000 : 300) {
            let content = mixture(&noise)
            guard let stream = compressor.stream(of: content) else { continue }
            #expect(strictlyInflated(stream) == content, "seed \(seed), round \(round)")
            #expect(Compressor(.deflate).stream(of: content) == stream, "seed \(seed)")
        }
    }

    /// Noise, runs, repetitions from near and far, and alphabets of any size, up to 2 MiB.
    private func mixture(_ noise: inout Noise) -> [UInt8] {
        let size = Int.random(in: 2...(1 << Int.random(in: 4...21, using: &noise)), using: &noise)
        var bytes: [UInt8] = []
        while bytes.count < size {
            let count = Int.random(
                in: 1...(1 << Int.random(in: 1...13, using: &noise)), using: &noise)
            switch Int.random(in: 0..<4, using: &noise) {
            case 0: bytes += Noise.bytes(count, seed: noise.next())
            case 1: bytes += [UInt8](repeating: .random(in: 0...255, using: &noise), count: count)
            case 2:
                let most = UInt8.random(in: 1...255, using: &noise)
                bytes += (0..<count).map { _ in .random(in: 0...most, using: &noise) }
            default:
                guard !bytes.isEmpty else { continue }
                let distance = Int.random(in: 1...min(bytes.count, 5000), using: &noise)
                for _ in 0..<count { bytes.append(bytes[bytes.count - distance]) }
            }
        }
        return Array(bytes[..<size])
    }

    @Test("A stream has its last block, wherever the one before it is full")
    func fullBlocks() {
        // Three bytes and a match, again and again: nothing ends a block but its length.
        let noise = Noise.bytes(3 * 24_000)
        let compressor = Compressor(.deflate)
        for count in 23_500..<23_700 {
            let content = (0..<count).flatMap {
                noise[3 * $0..<3 * $0 + 3] + Array("repeated".utf8)
            }
            #expect(
                compressor.stream(of: content).flatMap(strictlyInflated) == content,
                "\(count) steps")
        }
    }

    @Test("A stream that is a byte shorter than its cluster is taken, a longer one is not")
    func room() {
        let compressor = Compressor(.deflate)
        var lengths: Set<Int> = []
        for zeros in 0..<64 {
            let content = Noise.bytes(4096 - zeros) + [UInt8](repeating: 0, count: zeros)
            lengths.insert(compressor.stream(of: content)?.count ?? 4096)
        }
        #expect(lengths.isSuperset(of: [4093, 4094, 4095, 4096]))
    }

    @Test("Stored blocks of several pieces keep to the room, up to its last byte")
    func storedRoom() {
        let compressor = Compressor(.deflate)
        let noise = Noise.bytes(200_000)
        var spared: Set<Int> = []
        // The zeros save what the pieces' lengths and the headers cost, or just not.
        for zeros in 0..<800 {
            let content = noise + [UInt8](repeating: 0, count: zeros)
            let stream = compressor.stream(of: content)
            if let stream, content.count - stream.count < 4 {
                #expect(strictlyInflated(stream) == content)
            }
            spared.insert(content.count - (stream?.count ?? content.count))
        }
        #expect(spared.isSuperset(of: [0, 1, 2, 3]))
    }

    @Test(
        "Streams of a program are no longer than zlib's, as QEMU makes them; 1 % with low effort",
        arguments: [(CompressionEffort.usual, 1.0), (.low, 1.01)])
    func deflateLength(effort: CompressionEffort, most: Double) throws {
        try expect(.deflate, effort, atMost: most) { Streams.deflate($0) }
    }

    @Test(
        "Frames of a program are up to 4 % longer than at zstd's level 3; 5 % with low effort",
        arguments: [(CompressionEffort.usual, 1.04), (.low, 1.05)])
    func zstdLength(effort: CompressionEffort, most: Double) throws {
        try expect(.zstd, effort, atMost: most) { Streams.zstd($0) }
    }

    private func expect(
        _ method: Decompressor.Method, _ effort: CompressionEffort, atMost most: Double,
        _ qemu: ([UInt8]) -> [UInt8]
    ) throws {
        let file = URL(fileURLWithPath: TestEnvironment.program)
        let program = try [UInt8](Data(contentsOf: file).prefix(8 << 20))
        let compressor = Compressor(method, effort: effort)
        var ours = 0
        var theirs = 0
        for start in stride(from: 0, to: program.count, by: 65536) {
            let cluster = Array(program[start..<min(start + 65536, program.count)])
            ours += compressor.stream(of: cluster)?.count ?? cluster.count
            theirs += min(qemu(cluster).count, cluster.count)
        }
        #expect(Double(ours) <= Double(theirs) * most)
        #expect(theirs < program.count)
    }
}

extension Compressor {
    /// A cluster's stream; nothing is touched behind its place.
    fileprivate borrowing func stream(of cluster: [UInt8]) -> [UInt8]? {
        let guarded = 64
        let memory = UnsafeMutableRawBufferPointer.allocate(
            byteCount: cluster.count + guarded, alignment: 1)
        defer { memory.deallocate() }
        memory.initializeMemory(as: UInt8.self, repeating: 0xEE)
        let place = UnsafeMutableRawBufferPointer(rebasing: memory[..<cluster.count])
        let count = cluster.withUnsafeBytes { compress($0, into: place) }
        #expect(memory[(cluster.count - 1)...].allSatisfy { $0 == 0xEE })
        return count.map { Array(memory[..<$0]) }
    }
}

/// What a decoder reads that has the last 4 KiB alone; nil where it finds a fault, or more than the
/// stream.
private func strictlyInflated(_ stream: [UInt8]) -> [UInt8]? {
    var decoder = z_stream()
    guard qcowfs_inflate_init(&decoder, 12) == Z_OK else { return nil }
    defer { inflateEnd(&decoder) }
    var input = stream
    var result: [UInt8] = []
    // zlib looks into its window where the output in front of it is too short.
    var piece = [UInt8](repeating: 0, count: 100)
    var code = Z_OK
    input.withUnsafeMutableBufferPointer { input in
        decoder.next_in = input.baseAddress
        decoder.avail_in = UInt32(input.count)
        while code == Z_OK {
            piece.withUnsafeMutableBufferPointer { piece in
                decoder.next_out = piece.baseAddress
                decoder.avail_out = UInt32(piece.count)
                code = inflate(&decoder, Z_NO_FLUSH)
            }
            result += piece[..<(piece.count - Int(decoder.avail_out))]
        }
    }
    return code == Z_STREAM_END && decoder.avail_in == 0 ? result : nil
}
