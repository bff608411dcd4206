import Foundation
import TestSupport
import Testing

/// Feature bits of foreign images through a mount: the corrupt bit, autoclear and compatible bits,
/// and what nobody knows.
@Suite("Feature bits", .serialized, .enabledWhereMountable)
struct FeatureBitTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    /// An image with a field, an extension and bits that nobody knows.
    private func makeStrange() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.headerLength = 128
        builder.compatibleFeatures = 1 << 40 | 1
        builder.autoclearFeatures = 1 << 7 | 1 << 63
        builder.extensions = [(0x1234_5678, [1, 2, 3])]
        builder.fill(5, guestCluster: 0)
        builder.put([9, 8, 7], at: 112)
        _ = try folder.write(builder.build(), to: "disk.qcow2")
    }

    private func header() throws -> [UInt8] { try TestFile(image, O_RDONLY).read(0..<4096) }

    private func change(_ options: [String] = [], _ body: (TestFile) throws -> Void) throws {
        let mount = try TestMount(image, in: folder, options: options)
        try body(mount.open(options.contains("--read-only") ? O_RDONLY : O_RDWR))
        try mount.unmount()
    }

    private func isFirstClusterThere(_ options: [String] = []) throws -> Bool {
        var isThere = false
        try change(options) { isThere = try holds($0, 0..<65536, 5) }
        return isThere
    }

    private func autoclear() throws -> UInt64 { try header().number(at: 88, as: UInt64.self) }

    @Test("Trap 6: unknown autoclear bits go before the first write, never on a read-only open")
    func autoclearBits() throws {
        try makeStrange()
        #expect(try isFirstClusterThere(["--read-only"]))
        #expect(try autoclear() == 1 << 7 | 1 << 63)
        #expect(try isFirstClusterThere())
        try change { file in
            try file.write([1], at: 100)
            // The data is there at once, and the bits are gone already.
            #expect(try autoclear() == 0)
        }
        #expect(try autoclear() == 0)
    }

    @Test("Trap 7: compatible bits, lazy refcounts among them, stay as they are")
    func compatibleBits() throws {
        try makeStrange()
        try change { file in
            try file.write([1], at: 100)
            try file.truncate(to: 3.MiB)
        }
        #expect(try header().number(at: 80, as: UInt64.self) == 1 << 40 | 1)
        #expect(try QemuImg.check(image).status == 0)
    }

    @Test("Unknown fields and extensions survive writing, growing, snapshots and amending")
    func unknownParts() throws {
        try makeStrange()
        let program = TestEnvironment.program
        try change { file in
            try file.write([1], at: 100)
            try file.truncate(to: 2.MiB)
        }
        try Command.require(program, "snapshot", "-c", "one", image)
        try Command.require(program, "amend", "-o", "refcount_bits=32", image)
        let bytes = try header()
        #expect(Array(bytes[112..<128]) == [9, 8, 7] + [UInt8](repeating: 0, count: 13))
        let extensions = try ReferenceImage(image).qcow2.extensions()
        #expect(extensions.first { $0.type == 0x1234_5678 }?.data == [1, 2, 3])
        #expect(try QemuImg.check(image).status == 0)
    }

    @Test("A write that meets an impossible entry sets the corrupt bit; then only reading is left")
    func corrupt() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.fill(5, guestCluster: 0)
        builder.setEntry(0x50200 | 1 << 63, guestCluster: 3)
        _ = try folder.write(builder.build(), to: "disk.qcow2")
        let mount = try TestMount(image, in: folder)
        do {
            let file = try mount.open()
            #expect(throws: CallError.self) { try file.read(196608..<196609) }
            // Reading alone marks nothing.
            #expect(try header().number(at: 72, as: UInt64.self) == 0)
            #expect(throws: CallError.self) { try file.write([1], at: 196608) }
            #expect(throws: CallError.self) { try file.write([1], at: 0) }
            #expect(try holds(file, 0..<65536, 5))
        }
        // What could not be written is told once more.
        _ = try qcowfs("umount", mount.mountpoint)
        mount.wasUnmounted()
        #expect(try header().number(at: 72, as: UInt64.self) == 2)
        try expectMountRefused(
            image, in: folder, naming: ["--read-only", "check --repair all"])
        #expect(try isFirstClusterThere(["--read-only"]))
    }
}
