import QCOW2
import TestSupport
import Testing

/// Traps 19 and 26, 60: images that lie on other images.
@Suite("Traps of backing chains")
struct ChainTraps {
    /// An overlay of 512-byte clusters whose backing file's name can be changed in place.
    private func overlay(_ name: String) -> [UInt8] {
        var builder = ImageBuilder(byteCount: 64.KiB, clusterBits: 9)
        builder.extensions = [(HeaderExtension.backingFormat, Array("qcow2".utf8))]
        builder.backingName = name
        return builder.build()
    }

    private func expectRefused(
        _ path: String, _ words: String, sourceLocation: SourceLocation = #_sourceLocation
    ) {
        for options in [OpenOptions(), .readOnly] {
            do throws(ImageError) {
                try Image.open(path, options: options).close()
                Issue.record("it was opened", sourceLocation: sourceLocation)
            } catch {
                guard case .backing(let found) = error.kind, found.contains(words) else {
                    Issue.record("\(error)", sourceLocation: sourceLocation)
                    continue
                }
            }
        }
    }

    @Test("Trap 19: a chain that comes back to one of its files ends with an error")
    func loops() throws {
        let folder = try TemporaryDirectory()
        _ = try folder.write(overlay("lb.qcow2"), to: "la.qcow2")
        _ = try folder.write(overlay("la.qcow2"), to: "lb.qcow2")
        _ = try folder.write(overlay("self.qcow2"), to: "self.qcow2")
        _ = try folder.write(overlay("linked.qcow2"), to: "real.qcow2")
        try Command.require("ln", folder.file("real.qcow2"), folder.file("linked.qcow2"))
        for name in ["la", "lb", "self", "real"] {
            expectRefused(folder.file("\(name).qcow2"), "comes back")
        }
        // Nothing stays locked behind.
        let device = try FileDevice(path: folder.file("la.qcow2"), access: .readWrite)
        #expect(try ImageLock.take(.writer, on: device) == .held)
        device.close()
    }

    @Test("Trap 19: a chain of ten thousand files is refused before descriptors run out")
    func depth() throws {
        let folder = try TemporaryDirectory()
        var bytes = overlay("10000.qcow2")
        let place = Int(bytes.number(at: 8, as: UInt64.self))
        for number in 10_000..<20_000 {
            bytes.put(Array("\(number + 1).qcow2".utf8), at: place)
            _ = try folder.write(Array(bytes[..<512]), to: "\(number).qcow2")
        }
        expectRefused(folder.file("10000.qcow2"), "more than 200")
    }

    /// A disk in the plainest form: its bytes, and the layer that should show the same.
    private struct Model {
        var bytes: [UInt8]
        var image: Image.Backing
    }

    /// A layer over `model` with clusters of its own here and there.
    private func layer(over model: Model?, _ random: inout RepeatableRandom) -> Model {
        let bits = [9, 12, 14, 16][random.number(below: 4)]
        let size = (1 + random.number(below: 700)) * 512
        var image = ImageBuilder(byteCount: size, clusterBits: bits)
        var bytes = Array((model?.bytes ?? []).prefix(size))
        bytes += [UInt8](repeating: 0, count: size - bytes.count)
        for cluster in 0..<image.guestClusterCount {
            let byte = UInt8(truncatingIfNeeded: random.next()) | 1
            let content = [UInt8](repeating: byte, count: 1 << bits)
            let place = cluster << bits
            let end = min(place + 1 << bits, size)
            switch random.number(below: 8) {
            case 0: image.write(content, guestCluster: cluster)
            case 1: image.compress(content, guestCluster: cluster)
            case 2:
                image.zeroAllocated(guestCluster: cluster)
                bytes.put([UInt8](repeating: 0, count: end - place), at: place)
                continue
            default: continue
            }
            bytes.put(Array(content[..<(end - place)]), at: place)
        }
        return Model(
            bytes: bytes, image: .qcow2(RecordingDevice(image.build(), yielding: false)))
    }

    @Test(
        "Trap 60: what is copied up has the right length, whatever sizes the layers have",
        arguments: 0..<12 as Range<UInt64>)
    func copiesAcrossChains(run: UInt64) throws {
        let seed = TestEnvironment.seed &+ run
        var random = RepeatableRandom(seed: seed)
        let odd = (0..<random.number(below: 300_000)).map { UInt8($0 / 100 & 0xFF) }
        let raw = Model(bytes: odd, image: .raw(RecordingDevice(odd, yielding: false)))
        let middle = layer(over: raw, &random)
        let top = layer(over: middle, &random)
        guard case .qcow2(let device) = top.image, let record = device as? RecordingDevice else {
            return
        }
        var model = top.bytes
        let image = try Image.open(record, backing: [middle.image, raw.image])
        try #require(try image.bytes(0..<model.count) == model, "seed \(seed)")
        for step in 0..<60 {
            let start = random.number(below: model.count)
            let count = min(1 + random.number(below: 70_000 >> (step % 8)), model.count - start)
            let bytes = [UInt8](repeating: UInt8(step + 1), count: count)
            try image.write(bytes, at: start)
            model.put(bytes, at: start)
            if step % 20 == 19 { try image.flush() }
        }
        #expect(try image.bytes(0..<model.count) == model, "seed \(seed)")
        try image.close()
        try expectSound(record, "seed \(seed)")
        let again = try Image.open(record, backing: [middle.image, raw.image], options: .readOnly)
        #expect(try again.bytes(0..<model.count) == model, "seed \(seed)")
        try again.close()
    }
}
