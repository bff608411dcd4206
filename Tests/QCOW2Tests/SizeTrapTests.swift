import Glibc
import QCOW2
import TestSupport
import Testing

/// Disks that shrink and grow, with snapshots and without.
@Suite("Sizes")
struct SizeTrapTests {
    @Test(
        "Trap 61: nothing old reappears after shrinking and growing", arguments: [9, 12, 16],
        [false, true])
    func shrinkAndGrow(clusterBits: Int, hasBacking: Bool) throws {
        let size = 40 << clusterBits
        let builder = filled(size, clusterBits: clusterBits)
        let device = RecordingDevice(builder.build(), yielding: false)
        let below = RecordingDevice([UInt8](repeating: 0xBB, count: size * 2), yielding: false)
        let image = try Image.open(device, backing: hasBacking ? [.raw(below)] : [])
        try image.createSnapshot("kept")
        let before = try image.bytes(0..<size)
        for cut in [size / 2 + 512, 1 << clusterBits, 512, 0] {
            try image.write([UInt8](repeating: 0x77, count: size), at: 0)
            try image.resize(to: UInt64(cut), shrinking: true)
            try image.resize(to: UInt64(size))
            #expect(try image.bytes(cut..<size).allSatisfy { $0 == 0 })
            #expect(try image.bytes(0..<cut).allSatisfy { $0 == 0x77 })
        }
        try image.resize(to: UInt64(size * 2))
        #expect(try image.bytes(size..<size * 2).allSatisfy { $0 == 0 })
        try image.applySnapshot("kept")
        #expect(try image.bytes(0..<size) == before)
        try image.close()
        try expectSound(device)
    }

    @Test("QEMU shows no old bytes either when it grows what was shrunk here")
    func qemuGrows() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try QemuImg.create(path, size: 1.MiB)
        try QemuImg.io(path, ["write -q -P 0xAA 0 1M"])
        let image = try Image.open(path)
        try image.resize(to: UInt64(96.KiB), shrinking: true)
        try image.close()
        try Command.require("qemu-img", "resize", "-q", path, "1M")
        #expect(!(try QemuImg.io(path, ["read -P 0 96k 928k"])).contains("failed"))
        #expect(try QemuImg.check(path).status == 0)
    }

    @Test("New bytes are preallocated in every mode", arguments: ["metadata", "falloc", "full"])
    func preallocates(mode: String) throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try QemuImg.create(path, size: 1.MiB)
        let image = try Image.open(path)
        try image.resize(
            to: UInt64(3.MiB), preallocation: try #require(.init(rawValue: mode)))
        #expect(try image.bytes(0..<3.MiB).allSatisfy { $0 == 0 })
        try image.close()
        #expect(try QemuImg.check(path).status == 0)
        let file = try TestFile(path, O_RDONLY)
        #expect(try file.byteCount() >= 2.MiB)
        if mode != "metadata" { #expect(try Int(file.status().st_blocks) * 512 >= 2.MiB) }
        #expect(!(try QemuImg.io(path, ["read -P 0 0 3M"])).contains("failed"))
    }

    @Test(
        "A disk that finds no space to grow into keeps its size, and nothing leaks",
        arguments: ["falloc", "full"], [false, true])
    func noSpaceToGrow(mode: String, isExtended: Bool) throws {
        let preallocation = try #require(CreateOptions.Preallocation(rawValue: mode))
        var refusalCount = 0
        for call in 0..<100 {
            let device = RecordingDevice([], yielding: false)
            var options = CreateOptions()
            options.hasExtendedL2 = isExtended
            try Image.create(on: device, size: UInt64(1.MiB), options: options)
            let kind: FaultyDevice.Kind = mode == "full" ? .write : .reserve
            let faulty = FaultyDevice(
                device, FaultyDevice.Fault(kind, call: call, error: .noSpace))
            let image = try Image.open(faulty)
            try image.write([UInt8](repeating: 0xAA, count: 1.MiB), at: 0)
            guard !faulty.failed else { continue }
            do {
                try image.resize(to: UInt64(3.MiB), preallocation: preallocation)
                #expect(image.size == UInt64(3.MiB), "call \(call)")
            } catch {
                refusalCount += 1
                #expect(image.size == UInt64(1.MiB), "call \(call)")
            }
            #expect(try image.bytes(0..<1.MiB).allSatisfy { $0 == 0xAA })
            try image.close()
            try expectSound(device, "call \(call)")
            let again = try Image.open(device, options: .readOnly)
            #expect(again.size == image.size)
            try again.close()
            if !faulty.failed { break }
        }
        #expect(refusalCount > 4)
    }
}
