import Glibc
import QCOW2
import TestSupport
import Testing

/// Changing what kind of image a file is, judged by QEMU and by the tests' own reader.
@Suite("Amending", .needsQemuImg)
struct AmendTests {
    let folder: TemporaryDirectory
    let image: String

    init() throws {
        folder = try TemporaryDirectory()
        image = folder.file("disk.qcow2")
    }

    private func amend(_ change: (inout AmendOptions) -> Void) throws(ImageError) {
        var options = AmendOptions()
        change(&options)
        try Image.amend(image, options: options)
    }

    private func content(snapshot: String? = nil) throws -> String {
        let source = snapshot.map { ["-l", "snapshot.name=\($0)"] } ?? []
        let raw = folder.file("content.raw")
        try Command.require(["qemu-img", "convert", "-O", "raw"] + source + [image, raw])
        return try Command.require("sha256sum", raw)
    }

    private func expectClean(sourceLocation: SourceLocation = #_sourceLocation) throws {
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)", sourceLocation: sourceLocation)
    }

    /// Asks no lock: tests beside this one start programs, which hold our files until they run.
    private func header() throws -> Header {
        try #require(try ImageInfo(path: image, locking: .forceShare).header)
    }

    /// An image with data, zero clusters of both kinds, and a snapshot that shares some of them.
    private func make(_ options: [String], hasSnapshot: Bool = true) throws {
        try QemuImg.create(image, size: 4.MiB, options: options)
        try QemuImg.io(
            image, ["write -q -P 1 0 1M", "write -q -P 2 2M 300k", "write -q -z 64k 64k"])
        if hasSnapshot { try QemuImg.snapshot(image, create: "kept") }
        try QemuImg.io(
            image, ["write -q -P 3 512k 64k", "write -q -z 128k 64k", "write -q -z -u 2M 64k"])
    }

    @Test(
        "Refcounts of every width become refcounts of every other",
        arguments: [2, 4, 8, 16, 32, 64] as [UInt64], [512, 65536])
    func refcountWidth(bits: UInt64, clusterSize: Int) throws {
        try make(["refcount_bits=\(bits == 16 ? 2 : 16)", "cluster_size=\(clusterSize)"])
        let (before, kept) = try (content(), content(snapshot: "kept"))
        try amend { $0.refcountBits = bits }
        try expectClean()
        #expect(try header().refcountBits == Int(bits))
        #expect(try content() == before && content(snapshot: "kept") == kept)
        try QemuImg.io(image, ["write -q -P 9 3M 100k"])
        try expectClean()
    }

    @Test("Counts that do not fit the new width are refused, and nothing changes")
    func tooNarrow() throws {
        try make([])
        let before = try Command.require("sha256sum", image)
        #expect(throws: ImageError.self) { try amend { $0.refcountBits = 1 } }
        #expect(try Command.require("sha256sum", image) == before)
    }

    @Test("Trap 63: a downgrade zeroes no cluster that a snapshot shares", arguments: [512, 65536])
    func downgrade(clusterSize: Int) throws {
        try make(["cluster_size=\(clusterSize)"])
        let (before, kept) = try (content(), content(snapshot: "kept"))
        try amend { $0.version = .v2 }
        #expect(try header().version == 2)
        try expectClean()
        #expect(try content() == before && content(snapshot: "kept") == kept)
        try Command.require("qemu-img", "snapshot", "-a", "kept", image)
        try expectClean()
        #expect(try content() == kept)
    }

    @Test("A downgrade over a backing file goes on hiding it")
    func downgradeOverBacking() throws {
        let base = folder.file("base.qcow2")
        try QemuImg.create(base, size: 4.MiB)
        try QemuImg.io(base, ["write -q -P 0xbb 0 4M"])
        try QemuImg.create(image, options: [], backing: "base.qcow2")
        try QemuImg.io(
            image, ["write -q -P 1 0 1M", "write -q -z 64k 64k", "write -q -z -u 2M 1M"])
        let before = try content()
        try amend { $0.version = .v2 }
        try expectClean()
        #expect(try content() == before)
        try QemuImg.io(image, ["write -q -P 7 2M 1k", "read -q -P 0 2098176 64k"])
        try expectClean()
    }

    @Test("Version 2 becomes version 3, with its snapshots", arguments: [512, 65536])
    func upgrade(clusterSize: Int) throws {
        try make(["compat=0.10", "cluster_size=\(clusterSize)"])
        let (before, kept) = try (content(), content(snapshot: "kept"))
        try amend {
            $0.version = .v3
            $0.hasLazyRefcounts = true
            $0.refcountBits = 64
        }
        #expect(try header().version == 3)
        #expect(try header().compatibleFeatures.contains(.lazyRefcounts))
        try expectClean()
        #expect(try content() == before && content(snapshot: "kept") == kept)
    }

    @Test("Snapshots without extra data get the disk's size when they come to version 3")
    func upgradesSnapshots() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, version: 2)
        builder.fill(1, guestCluster: 0)
        builder.snapshot("old", extraLength: 0)
        let path = try folder.write(builder.build(), to: "disk.qcow2")
        try amend { $0.version = .v3 }
        #expect(
            try ImageInfo(path: path, locking: .forceShare).snapshots.map(\.diskByteCount)
                == [1 << 20])
        try expectClean()
    }

    @Test("What version 2 cannot hold is refused, and nothing changes")
    func downgradeRefused() throws {
        for options in [
            ["refcount_bits=8"], ["extended_l2=on"], ["compression_type=zstd"],
            ["data_file=\(folder.file("data"))"],
        ] {
            try QemuImg.create(image, size: 1.MiB, options: options)
            let before = try Command.require("sha256sum", image)
            #expect(throws: ImageError.self, "\(options)") { try amend { $0.version = .v2 } }
            #expect(try Command.require("sha256sum", image) == before)
        }
        try QemuImg.create(image, size: 1.MiB)
        try Command.require("qemu-img", "bitmap", "--add", image, "b")
        #expect(throws: ImageError.self) { try amend { $0.version = .v2 } }
    }

    @Test("Wishes that contradict the image or each other are refused")
    func refused() throws {
        try QemuImg.create(image, size: 1.MiB, options: ["compat=0.10"])
        let changes: [(inout AmendOptions) -> Void] = [
            { $0.refcountBits = 8 }, { $0.refcountBits = 3 }, { $0.hasLazyRefcounts = true },
            { $0.backingFormat = "raw" }, { $0.backingFile = "x" }, { $0.dataFile = "x" },
            { $0.dataFileIsRaw = true }, { $0.size = 512 }, { $0.size = 1000 },
        ]
        for change in changes {
            #expect(throws: ImageError.self) { try amend(change) }
        }
        #expect(try header().version == 2)
    }

    @Test("Backing file, size and lazy refcounts change, and change back")
    func headerFields() throws {
        try QemuImg.create(image, size: 1.MiB)
        try QemuImg.create(folder.file("base.raw"), size: 1.MiB)
        try amend {
            $0.backingFile = "base.raw"
            $0.backingFormat = "raw"
            $0.hasLazyRefcounts = true
        }
        #expect(try header().backingFile == "base.raw" && header().backingFormat == "raw")
        try expectClean()
        try amend { $0.size = 3 << 20 }
        #expect(try header().virtualByteCount == 3 << 20)
        try amend {
            $0.backingFile = ""
            $0.hasLazyRefcounts = false
        }
        #expect(try header().backingFile == nil && header().backingFormat == nil)
        #expect(try !header().compatibleFeatures.contains(.lazyRefcounts))
        try expectClean()
    }

    @Test("A raw data file becomes a plain one, and may be renamed")
    func dataFile() throws {
        let data = folder.file("disk.data")
        try QemuImg.create(
            image, size: 1.MiB, options: ["data_file=\(data)", "data_file_raw=on"])
        try Command.require("mv", data, folder.file("other.data"))
        try amend {
            $0.dataFile = folder.file("other.data")
            $0.dataFileIsRaw = false
        }
        #expect(try !header().hasRawDataFile && header().dataFileName == folder.file("other.data"))
        try expectClean()
    }

    @Test("An image that was not closed is repaired first")
    func dirty() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.fill(1, guestCluster: 0)
        builder.incompatibleFeatures = 1
        _ = try folder.write(builder.build(), to: "disk.qcow2")
        try amend { $0.refcountBits = 8 }
        #expect(try !header().incompatibleFeatures.contains(.dirty))
        try expectClean()
    }

    @Test("Trap 10: unknown fields, extensions and compatible bits survive a rewritten header")
    func keepsUnknown() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.headerLength = 128
        builder.compatibleFeatures = 1 << 40
        builder.autoclearFeatures = 1 << 41
        builder.backingName = "base.raw"
        builder.extensions = [
            (0xE279_2ACA, Array("raw".utf8)), (0x1234_5678, [1, 2, 3]), (0x5678_1234, []),
        ]
        builder.put([9, 8, 7], at: 112)
        let path = try folder.write(builder.build(), to: "disk.qcow2")
        try amend {
            $0.hasLazyRefcounts = true
            $0.refcountBits = 64
        }
        let bytes = try TestFile(path, O_RDONLY).read(0..<4096)
        #expect(Array(bytes[112..<128]) == [9, 8, 7] + [UInt8](repeating: 0, count: 13))
        let header = try header()
        #expect(header.compatibleFeatures.rawValue == 1 << 40 | 1)
        #expect(header.autoclearFeatures.rawValue == 0)
        #expect(header.backingFile == "base.raw" && header.backingFormat == "raw")
        #expect(header.extensions.first { $0.type == 0x1234_5678 }?.data == [1, 2, 3])
        #expect(header.extensions.contains { $0.type == 0x5678_1234 })
    }

    // MARK: Power cuts

    struct Cut: Sendable, CustomTestStringConvertible {
        let testDescription: String
        var version: UInt32 = 3
        var extensionByteCount = 0
        let change: @Sendable (inout AmendOptions) -> Void

        static let all: [Cut] = [
            Cut(testDescription: "refcount width") { $0.refcountBits = 64 },
            Cut(testDescription: "downgrade") { $0.version = .v2 },
            Cut(testDescription: "upgrade", version: 2) { $0.version = .v3 },
            Cut(testDescription: "long header, upgrade", version: 2, extensionByteCount: 900) {
                $0.version = .v3
            },
            Cut(testDescription: "long header, renamed backing file", extensionByteCount: 900) {
                $0.backingFile = "another/base.raw"
                $0.hasLazyRefcounts = true
            },
            Cut(testDescription: "long header, no backing file", extensionByteCount: 900) {
                $0.backingFile = ""
            },
        ]
    }

    @Test("A power cut leaves the old image or the new one", arguments: Cut.all)
    func cut(_ cut: Cut) throws {
        var builder = ImageBuilder(byteCount: 64.KiB, version: cut.version, clusterBits: 12)
        builder.backingName = "base.raw"
        builder.extensions = [(0xE279_2ACA, Array("raw".utf8))]
        if cut.extensionByteCount > 0 {
            builder.extensions.append(
                (0x1234_5678, (0..<cut.extensionByteCount).map { UInt8($0 & 0x7f) + 1 }))
        }
        for cluster in 0..<6 { builder.fill(UInt8(cluster + 1), guestCluster: cluster) }
        if cut.version == 3 {
            builder.zeroAllocated(guestCluster: 2)
            builder.snapshot("kept")
            builder.zero(guestCluster: 3)
        }
        let device = RecordingDevice(builder.build(), yielding: false)
        let model = try device.bytes.withUnsafeBytes { try ReferenceReader($0).read(0..<64.KiB) }
        var options = AmendOptions()
        cut.change(&options)
        let before = try Header.read(from: device)
        try Image.amend(on: device, options: options)
        let after = try Header.read(from: device)
        #expect(after != before)

        var explorer = CrashExplorer(initial: device.initial, seed: TestEnvironment.seed)
        for moment in device.moments {
            if case .flushed = moment {
                let found = explorer.explore { fault(in: $0, before, after, model) }
                #expect(found == nil)
                if found != nil { return }
            }
            explorer.advance(moment)
        }
        let end = device.bytes.withUnsafeBytes { fault(in: $0, after, after, model) }
        #expect(end == nil)
        print("• \(explorer.stateCount) states of an amendment: \(cut.testDescription)")
    }

    /// What is wrong with a state; nil where it is the old image or the new one.
    private func fault(
        in state: UnsafeRawBufferPointer, _ before: Header, _ after: Header, _ model: [UInt8]
    ) -> String? {
        do {
            let device = RecordingDevice([UInt8](state), yielding: false)
            let header = try Header.read(from: device)
            let found = [header.backingFile, header.backingFormat]
            guard
                [before, after].contains(where: {
                    $0.version == header.version && $0.refcountOrder == header.refcountOrder
                        && [$0.backingFile, $0.backingFormat] == found
                })
            else { return "the header is a mixture: \(header)" }
            let unknown = { (header: Header) in
                header.extensions.first { $0.type == 0x1234_5678 }
            }
            guard unknown(header) == unknown(before) else { return "an extension is gone" }
            let reader = try ReferenceReader(state)
            let audit = reader.audit()
            if let fault = audit.faults.first { return fault }
            guard try reader.read(0..<model.count) == model else { return "the disk has changed" }
            for snapshot in try reader.snapshots().entries {
                let kept = try reader.read(0..<model.count, through: snapshot.table)
                guard kept[3 * 4096] == 4, kept[2 * 4096] == 0 else { return "snapshot changed" }
            }
            return nil
        } catch { return "\(error)" }
    }
}
