import QCOW2
import TestSupport
import Testing

@Suite("What an audit finds out without opening another file")
struct ImageAuditTests {
    let place: FileTree

    init() throws { place = try FileTree() }

    private func audit(
        _ builder: ImageBuilder, policy: OpenPolicy = .imageDirectory
    ) throws -> ImageAudit {
        try ImageAudit(path: place.file("disk.qcow2", builder.build()), policy: policy)
    }

    @Test("it judges names as opening does")
    func references() throws {
        _ = try place.file("base.raw", [1])
        for (name, format, verdict) in [
            ("base.raw", "raw", ImageAudit.Reference.Verdict.allowed),
            ("other.raw", "raw", .missing), ("/etc/passwd", "raw", .refused),
            ("base.raw", "vmdk", .refused), ("nbd:x", "raw", .refused),
        ] {
            var builder = ImageBuilder(byteCount: 1.MiB)
            builder.backingName = name
            builder.extensions = [(0xe279_2aca, Array(format.utf8))]
            let audit = try audit(builder)
            #expect(audit.references.map(\.verdict) == [verdict], "\(name)")
            #expect(audit.isRefused == (verdict == .refused), "\(name)")
            let opened = try? Image.open(audit.path, options: .readOnly)
            #expect((opened != nil) == (verdict == .allowed), "\(name)")
            try opened?.close()
        }
    }

    @Test("it counts what the tables show: data, streams, and no zeros")
    func contents() throws {
        var builder = ImageBuilder(byteCount: 1.MiB)
        builder.fill(1, guestCluster: 0)
        builder.zero(guestCluster: 1)
        builder.zeroAllocated(guestCluster: 2)
        builder.compress([UInt8](repeating: 7, count: 65536), guestCluster: 3)
        let contents = try audit(builder).contents
        #expect(contents.isComplete && contents.l2TableCount == 1)
        #expect(contents.dataClusterCount == 2 && contents.compressedClusterCount == 1)
        #expect(contents.expandedByteCount == 131072)
        #expect((1...1024).contains(contents.streamByteCount))
    }

    @Test("subclusters count where they are allocated")
    func subclusters() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, isExtended: true)
        builder.fill(1, guestCluster: 0)
        builder.zeroAllocated(guestCluster: 1)
        let audit = try audit(builder)
        #expect(audit.contents.dataClusterCount == 1)
        #expect(audit.features.map(\.name) == ["extended L2 entries"])
    }

    @Test("tables past the end of the file are told")
    func tablesOutside() throws {
        var bytes = ImageBuilder(byteCount: 1.MiB).build()
        bytes.put(UInt64(1 << 40), at: 40)
        let audit = try ImageAudit(path: place.file("disk.qcow2", bytes))
        #expect(!audit.isRefused)
        #expect(audit.warnings.contains { $0.contains("L1 table at 0x10000000000") })
    }
}
