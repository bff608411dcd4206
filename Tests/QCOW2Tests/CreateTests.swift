import QCOW2
import TestSupport
import Testing

/// Every kind of image that `create` makes, judged by qemu-img, and every kind that it refuses.
@Suite("Creating images")
struct CreateTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    struct Kind: Sendable, CustomTestStringConvertible {
        var clusterByteCount: UInt64
        var refcountBits: UInt64
        var preallocation: CreateOptions.Preallocation
        var hasExtendedL2 = false

        var options: CreateOptions {
            var options = CreateOptions()
            options.clusterByteCount = clusterByteCount
            options.refcountBits = refcountBits
            options.preallocation = preallocation
            options.hasExtendedL2 = hasExtendedL2
            return options
        }

        var testDescription: String {
            "\(clusterByteCount) B, \(refcountBits) bits, \(preallocation.rawValue)"
                + (hasExtendedL2 ? ", subclusters" : "")
        }

        static let all: [Kind] = [512, 4096, 65536, 2 << 20].flatMap { clusterByteCount in
            [1, 2, 8, 16, 64].flatMap { refcountBits in
                [.off, .metadata, .falloc, .full].map {
                    Kind(
                        clusterByteCount: clusterByteCount, refcountBits: refcountBits,
                        preallocation: $0)
                }
            }
        }

        static let extended: [Kind] = [16384, 65536, 2 << 20].flatMap { clusterByteCount in
            [.off, .metadata, .falloc, .full].map {
                Kind(
                    clusterByteCount: clusterByteCount, refcountBits: 16, preallocation: $0,
                    hasExtendedL2: true)
            }
        }
    }

    @Test(
        "qemu-img finds no fault with a new image", .needsQemuImg,
        arguments: Kind.all + Kind.extended)
    func clean(kind: Kind) throws {
        try Image.create(at: image, size: 5_000_000, options: kind.options)
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
        let ours = try ImageCheck(path: image)
        #expect(ours.corruptionCount == 0 && ours.leakCount == 0)
        let info = try ImageInfo(path: image)
        #expect(info.virtualByteCount == 5_000_192)
        if kind.preallocation == .falloc || kind.preallocation == .full {
            #expect(info.allocatedByteCount >= info.virtualByteCount)
        }
    }

    @Test(
        "A preallocated image with subclusters shows its backing file",
        .needsQemuImg)
    func preallocatedOverBacking() throws {
        let base = try folder.write([UInt8](repeating: 0xBB, count: 300_000), to: "base.raw")
        var options = CreateOptions()
        options.hasExtendedL2 = true
        options.preallocation = .metadata
        options.backingFile = "base.raw"
        options.backingFormat = "raw"
        try Image.create(at: image, size: nil, options: options)
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
        #expect(try QemuImg.difference(base, image) == nil)
        let opened = try Image.open(image)
        #expect(try opened.bytes(0..<300_000).allSatisfy { $0 == 0xBB })
        try opened.write([1], at: 100_000)
        try opened.close()
        #expect(try QemuImg.check(image).status == 0)
        let both = try TestFile(base, 2)
        try both.write([1], at: 100_000)
        #expect(try QemuImg.difference(base, image) == nil)
    }

    @Test("On a device that held something else, the disk is empty all the same")
    func usedDevice() throws {
        let device = RestlessDevice(byteCount: 4 << 20)
        let garbage = [UInt8](repeating: 0xEE, count: 4 << 20)
        try garbage.withUnsafeBytes { try device.write($0, at: 0) }
        var options = CreateOptions()
        options.clusterByteCount = 4096
        options.preallocation = .metadata
        try Image.create(on: device, size: 1 << 20, options: options)
        let check = try ImageCheck(device)
        #expect(check.corruptionCount == 0 && check.leakCount == 0)
        let image = try Image.open(device, options: OpenOptions(access: .readOnly))
        var bytes = [UInt8](repeating: 1, count: 1 << 20)
        try bytes.withUnsafeMutableBytes { try image.read(into: $0, at: 0) }
        #expect(bytes.allSatisfy { $0 == 0 })
        try image.close()
    }

    @Test("Before the header is written, a device that held an image holds none")
    func headerLast() throws {
        let base = RAMDisk()
        try Image.create(on: base, size: 1 << 20)
        for fault in [
            FaultyDevice.Fault(.write, call: 0), .init(.write, call: 1), .init(.write, call: 2),
            .init(.flush, call: 0),
        ] {
            #expect(throws: ImageError.self) {
                try Image.create(on: FaultyDevice(base, fault), size: 2 << 20)
            }
            #expect(throws: ImageError.self) { try Header.read(from: base) }
        }
    }

    @Test("A disk of size 0, and sizes that are rounded up")
    func sizes() throws {
        for (wanted, found) in [(0, 0), (1, 512), (1000, 1024), (1 << 40, 1 << 40)]
            as [(UInt64, UInt64)]
        {
            try Image.create(at: image, size: wanted)
            #expect(try ImageInfo(path: image).virtualByteCount == found)
        }
    }

    func refused(
        size: UInt64? = 1 << 20, sourceLocation: SourceLocation = #_sourceLocation,
        _ change: (inout CreateOptions) -> Void
    ) -> ImageError.Kind? {
        var options = CreateOptions()
        change(&options)
        do throws(ImageError) {
            try Image.create(at: image, size: size, options: options)
            Issue.record("it was created", sourceLocation: sourceLocation)
            return nil
        } catch {
            #expect(!error.description.contains("\n"), sourceLocation: sourceLocation)
            #expect(FileDevice.Identity(ofFileAt: image) == nil, sourceLocation: sourceLocation)
            return error.kind
        }
    }

    @Test("What qemu-img refuses is refused, and leaves no file")
    func contradictions() throws {
        let changes: [(inout CreateOptions) -> Void] = [
            { $0.clusterByteCount = 256 }, { $0.clusterByteCount = 1000 },
            { $0.clusterByteCount = 4 << 20 }, { $0.clusterByteCount = 0 },
            { $0.refcountBits = 3 }, { $0.refcountBits = 0 }, { $0.refcountBits = 128 },
            {
                $0.version = .v2
                $0.refcountBits = 8
            },
            {
                $0.version = .v2
                $0.hasLazyRefcounts = true
            },
            {
                $0.version = .v2
                $0.compressionType = .zstd
            },
            {
                $0.version = .v2
                $0.hasExtendedL2 = true
            },
            {
                $0.hasExtendedL2 = true
                $0.clusterByteCount = 8192
            },
            {
                $0.version = .v2
                $0.dataFile = "data.raw"
            },
            { $0.dataFileIsRaw = true }, { $0.dataFile = "" }, { $0.dataFile = "nbd:x" },
            {
                $0.dataFile = "data.raw"
                $0.dataFileIsRaw = true
                $0.backingFile = "x"
                $0.backingFormat = "raw"
            },
            { $0.backingFormat = "qcow2" }, { $0.backingFile = "x" },
            {
                $0.backingFile = "x"
                $0.backingFormat = "vmdk"
            },
            {
                $0.backingFile = ""
                $0.backingFormat = "raw"
            },
            {
                $0.backingFile = String(repeating: "x", count: 1024)
                $0.backingFormat = "raw"
            },
            {
                $0.backingFile = "x"
                $0.backingFormat = "raw"
                $0.preallocation = .metadata
            },
        ]
        for change in changes {
            guard case .invalidArgument = refused(change) else {
                Issue.record("refused for another reason")
                continue
            }
        }
        #expect(refused(size: nil) { _ in } != nil)
        #expect(refused(size: .max) { _ in } != nil)
        #expect(refused(size: 129 << 30) { $0.clusterByteCount = 512 } != nil)
    }

    @Test("The size comes from the backing file where none is given")
    func backing() throws {
        _ = try folder.write([UInt8](repeating: 1, count: 100_001), to: "base.raw")
        var options = CreateOptions()
        options.backingFile = "base.raw"
        options.backingFormat = "raw"
        try Image.create(at: image, size: nil, options: options)
        let info = try ImageInfo(path: image)
        #expect(info.virtualByteCount == 100_352)
        #expect(info.header?.backingFile == "base.raw" && info.header?.backingFormat == "raw")
        #expect(info.backingPath == folder.file("base.raw"))

        options.backingFile = "disk.qcow2"
        options.backingFormat = "qcow2"
        try Image.create(at: folder.file("top.qcow2"), size: nil, options: options)
        #expect(try ImageInfo.chain(path: folder.file("top.qcow2")).count == 3)
    }

    @Test("A missing backing file is refused, except where it is not to be opened")
    func missingBacking() throws {
        #expect(
            refused {
                $0.backingFile = "none.raw"
                $0.backingFormat = "raw"
            } != nil)
        var options = CreateOptions()
        options.backingFile = "none.raw"
        options.backingFormat = "raw"
        options.opensBackingFile = false
        try Image.create(at: image, size: 1 << 20, options: options)
        #expect(try ImageInfo(path: image).header?.backingFile == "none.raw")
    }

    @Test("A file in use is not replaced, and a failed attempt leaves it as it was")
    func inUse() throws {
        try Image.create(at: image, size: 1 << 20)
        let user = try FileDevice(path: image, access: .readOnly)
        try ImageLock.take(.reader, on: user)
        do throws(ImageError) {
            try Image.create(at: image, size: 2 << 20)
            Issue.record("it was replaced")
        } catch {
            guard case .locked = error.kind else { throw error }
        }
        user.close()
        #expect(try ImageInfo(path: image).virtualByteCount == 1 << 20)
        try Image.create(at: image, size: 2 << 20)
        #expect(try ImageInfo(path: image).virtualByteCount == 2 << 20)
        #expect(try Command.shell("ls -A \(folder.path)") == "disk.qcow2\n")
    }

    @Test("Through a link the file is replaced, not the link")
    func link() throws {
        try Image.create(at: image, size: 1 << 20)
        try Command.require("ln", "-s", "disk.qcow2", folder.file("link"))
        try Image.create(at: folder.file("link"), size: 2 << 20)
        #expect(try ImageInfo(path: image).virtualByteCount == 2 << 20)
        try Command.require("test", "-L", folder.file("link"))
    }
}

/// A device that cannot change its length and does not forget, as a disk.
private final class RestlessDevice: BlockDevice {
    let name = "disk"
    private let memory: RAMDisk
    init(byteCount: UInt64) { memory = RAMDisk(byteCount: byteCount) }
    func byteCount() throws(SystemError) -> UInt64 { try memory.byteCount() }
    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(SystemError)
        -> Int
    {
        try memory.read(into: buffer, at: offset)
    }
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        try memory.write(bytes, at: offset)
    }
    func flush() throws(SystemError) {}
    func resize(to byteCount: UInt64) throws(SystemError) { throw .notSupported }
}
