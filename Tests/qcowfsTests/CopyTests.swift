import Glibc
import TestSupport
import Testing

/// Sparse copies of a mounted disk.
@Suite("Copies", .serialized, .enabledWhereMountable)
struct CopyTests {
    @Test("cp --sparse=always equals the disk, and holes agree with qemu-img map")
    func sparseCopy() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(
            image, size: 64.MiB,
            commands: [
                "write -q -P 1 0 3M", "write -q -P 2 17M 64k", "write -q -z 20M 1M",
                "write -q -P 3 63M 1M",
            ])
        let mount = try TestMount(image, in: folder)
        let copy = folder.file("copy.raw")
        try Command.require("cp", "--sparse=always", mount.disk, copy)
        let ranges = try mount.open(O_RDONLY).dataRanges()
        try mount.unmount()
        #expect(try QemuImg.difference(copy, image) == nil)
        #expect(try QemuImg.dataRanges(image) == ranges)
        #expect(try Int(TestFile(copy, O_RDONLY).status().st_blocks) * 512 < 8.MiB)
    }

    @Test(
        "a copy right after an unsynced write has it",
        arguments: [[], ["--writeback", "on"]], ["always", "auto"])
    func copyAfterWrite(options: [String], sparse: String) throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try makeImage(image, size: 64.MiB)
        let mount = try TestMount(image, in: folder, options: options)
        let model = try ReferenceDisk(contentsOf: mount.disk)
        let copy = folder.file("copy.raw")
        try write(mount, model)
        try Command.require("cp", "--sparse=\(sparse)", mount.disk, copy)
        let copied = try ReferenceDisk(contentsOf: copy)
        #expect(
            model.firstDifference(
                in: 0..<model.byteCount, from: UnsafeRawBufferPointer(copied.bytes)) == nil)
        try mount.unmount()
        #expect(try QemuImg.difference(copy, image) == nil)
    }

    /// Leaves the file open while the copy runs, as a program in the middle of its work does.
    private func write(_ mount: TestMount, _ model: ReferenceDisk) throws {
        let file = try mount.open()
        for (offset, count) in [(30.MiB + 5, 100_000), (50.MiB, 4096), (0, 1)] {
            let bytes = [UInt8](repeating: 0xCC, count: count)
            try file.write(bytes, at: offset)
            bytes.withUnsafeBytes { model.write($0, at: offset) }
        }
    }

    @Test("a chain of five reads and copies as QEMU reads it")
    func chain() throws {
        let folder = try TemporaryDirectory()
        var below: String?
        for layer in 1...5 {
            let path = folder.file("layer\(layer).qcow2")
            try QemuImg.create(path, size: 16.MiB, backing: below)
            try QemuImg.io(path, ["write -q -P \(layer) \(layer)M \(6 - layer)M"])
            below = "layer\(layer).qcow2"
        }
        let image = folder.file("layer5.qcow2")
        let mount = try TestMount(image, in: folder, options: ["-r"])
        let copy = folder.file("copy.raw")
        try Command.require("cp", "--sparse=always", mount.disk, copy)
        let ranges = try mount.open(O_RDONLY).dataRanges()
        try mount.unmount()
        #expect(try QemuImg.difference(copy, image) == nil)
        #expect(try QemuImg.dataRanges(image) == ranges)
    }

    @Test("reading leaves every file of the chain as it was")
    func leavesFilesAlone() throws {
        let folder = try TemporaryDirectory()
        try makeImage(folder.file("base.qcow2"))
        let image = folder.file("top.qcow2")
        try QemuImg.create(image, backing: "base.qcow2")
        let before = try Command.shell("cd \(folder.path) && sha256sum *.qcow2")
        let mount = try TestMount(image, in: folder, options: ["--read-only"])
        try Command.require("cat", mount.disk)
        try mount.unmount()
        #expect(try Command.shell("cd \(folder.path) && sha256sum *.qcow2") == before)
    }
}
