import Glibc
import TestSupport
import Testing

/// Extended L2 images that QEMU makes, through a real mount, and ours in QEMU's eyes.
@Suite("Subclusters, mounted", .serialized, .enabledWhereMountable)
struct SubclusterTests {
    /// What is made, and with which of qemu-io's commands.
    struct Fixture: Sendable, CustomTestStringConvertible {
        let testDescription: String
        var options: [String] = []
        var backing = false
        let commands: [String]
    }

    static let fixtures = [
        Fixture(
            testDescription: "a write and zeros of a part of it",
            commands: ["write -q -P 1 2k 4k", "write -q -z 8k 2k"]),
        Fixture(
            testDescription: "zeroed and discarded clusters over a backing file", backing: true,
            commands: [
                "write -q -P 1 0 256k", "write -q -z -u 0 64k", "discard 64k 64k",
                "write -q -z 130k 10k", "discard 512k 128k", "write -q -z 700k 3k",
            ]),
        Fixture(
            testDescription: "one subcluster over a compressed cluster",
            commands: ["write -q -c -P 5 0 64k", "write -q -P 6 4k 2k", "write -q -c -P 7 64k 64k"]
        ),
        Fixture(
            testDescription: "metadata preallocated over a backing file",
            options: ["preallocation=metadata"], backing: true,
            commands: ["write -q -P 9 3k 9k", "write -q -z 20k 4k"]),
        Fixture(
            testDescription: "clusters of 16k", options: ["cluster_size=16k"], backing: true,
            commands: ["write -q -P 1 512 1k", "write -q -z 5k 2k", "write -q -P 2 40k 100k"]),
        Fixture(
            testDescription: "clusters of 2M", options: ["cluster_size=2M"], backing: true,
            commands: ["write -q -P 1 100k 1k", "write -q -z 1M 64k", "write -q -P 2 1900k 300k"]),
        Fixture(
            testDescription: "zstd", options: ["compression_type=zstd"],
            commands: ["write -q -c -P 5 0 64k", "write -q -P 6 64k 2k"]),
    ]

    private func make(_ fixture: Fixture, in folder: TemporaryDirectory) throws -> String {
        let image = folder.file("disk.qcow2")
        let base = [UInt8]((0..<3.MiB).map { UInt8(truncatingIfNeeded: $0 / 512) | 1 })
        if fixture.backing { _ = try folder.write(base, to: "base.raw") }
        try QemuImg.create(
            image, size: 4.MiB, options: ["extended_l2=on"] + fixture.options,
            backing: fixture.backing ? "base.raw" : nil, backingFormat: "raw")
        try QemuImg.io(image, fixture.commands)
        return image
    }

    @Test("Bytes are those of qemu-img convert, holes those of qemu-img map", arguments: fixtures)
    func readsAsQEMU(_ fixture: Fixture) throws {
        let folder = try TemporaryDirectory()
        let image = try make(fixture, in: folder)
        let raw = folder.file("expected.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        let mount = try TestMount(image, in: folder, options: ["--read-only"])
        let (bytes, ranges) = try look(at: mount)
        try mount.unmount()
        #expect(try bytes == TestFile(raw, O_RDONLY).read(0..<4.MiB))
        #expect(try ranges == QemuImg.dataRanges(image))
    }

    /// The file is closed on return: an open one keeps a mount busy.
    private func look(at mount: TestMount) throws -> ([UInt8], [Range<Int>]) {
        let file = try mount.open(O_RDONLY)
        return (try file.read(0..<4.MiB), try file.dataRanges())
    }

    private func change(_ mount: TestMount, as command: String) throws {
        let file = try mount.open()
        switch command {
        case "write -q -z 8k 2k": try file.zero(8192..<10240)
        case "write -q -z -u 0 64k": try file.punch(0..<65536)
        case "write -q -z 0 64k": try file.zero(0..<65536)
        default: try file.write([UInt8](repeating: 6, count: 2048), at: 4096)
        }
    }

    @Test(
        "Our changes leave the entries that QEMU's leave",
        arguments: [
            ["write -q -P 1 2k 4k", "write -q -z 8k 2k"],
            ["write -q -P 1 0 64k", "write -q -z -u 0 64k"],
            ["write -q -c -P 5 0 64k", "write -q -P 6 4k 2k"],
            ["write -q -P 1 0 6k", "write -q -z 0 64k"],
        ])
    func sameEntries(_ commands: [String]) throws {
        let folder = try TemporaryDirectory()
        let theirs = folder.file("theirs.qcow2")
        let ours = folder.file("ours.qcow2")
        for image in [theirs, ours] {
            try QemuImg.create(image, size: 4.MiB, options: ["extended_l2=on"])
            try QemuImg.io(image, [commands[0]])
        }
        try QemuImg.io(theirs, [commands[1]])
        let mount = try TestMount(ours, in: folder)
        try change(mount, as: commands[1])
        try mount.unmount()
        let entries = try [theirs, ours].map { path in
            let reader = try ReferenceImage(path).qcow2
            return [
                try reader.rawEntry(forGuestCluster: 0, in: reader.active) == 0 ? 0 : 1,
                try reader.bitmap(forGuestCluster: 0, in: reader.active),
            ]
        }
        #expect(entries[0] == entries[1])
        #expect(try QemuImg.check(ours).status == 0)
    }
}
