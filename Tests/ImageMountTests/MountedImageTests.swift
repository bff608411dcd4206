import Glibc
import ImageMount
import Logging
import QCOW2
import Testing

/// The exposed file, asked without a kernel.
@Suite("The exposed file")
struct MountedImageTests {
    private static let cluster: UInt64 = 65536
    /// Ends inside a cluster.
    private static let size: UInt64 = 10 * cluster + 1024

    private func mounted(
        rules: FileRules = FileRules(), access: OpenOptions.Access = .readWrite
    ) throws -> MountedImage {
        let disk = RAMDisk()
        try Image.create(on: disk, size: Self.size)
        var options = OpenOptions()
        options.access = access
        return MountedImage(
            try Image.open(disk, options: options), path: "disk.qcow2", rules: rules,
            logger: Logger(label: "", factory: { _ in SwiftLogNoOpLogHandler() }))
    }

    private func write(_ count: Int, at offset: UInt64, to image: borrowing MountedImage) throws
        -> Int
    {
        let bytes = [UInt8](repeating: 0xA5, count: count)
        return try bytes.withUnsafeBytes { try image.write($0, at: offset) }
    }

    @Test("A write inside the disk is whole")
    func writeInside() throws {
        let image = try mounted()
        #expect(try write(4096, at: 0, to: image) == 4096)
    }

    @Test("A write over the end of the disk is short")
    func writeOverEnd() throws {
        let image = try mounted()
        #expect(try write(4096, at: Self.size - 512, to: image) == 512)
    }

    @Test("A write past the end of the disk is ENOSPC", arguments: [0, 1, 1 << 40])
    func writePastEnd(distance: UInt64) throws {
        let image = try mounted()
        #expect(throws: SystemError.noSpace) {
            _ = try write(1, at: Self.size + distance, to: image)
        }
    }

    @Test("A truncate to 0 changes nothing")
    func truncateToZero() throws {
        let image = try mounted()
        #expect(try image.truncate(to: 0) == Self.size)
    }

    @Test("A truncate to 0 changes nothing where shrinking is allowed")
    func truncateToZeroWithShrinking() throws {
        var rules = FileRules()
        rules.allowsShrinking = true
        let image = try mounted(rules: rules)
        #expect(try image.truncate(to: 0) == Self.size)
    }

    @Test("A truncate to the present size succeeds")
    func truncateToSame() throws {
        let image = try mounted()
        #expect(try image.truncate(to: Self.size) == Self.size)
    }

    @Test("A truncate to more grows the disk")
    func truncateToMore() throws {
        let image = try mounted()
        #expect(try image.truncate(to: Self.size + 512) == Self.size + 512)
    }

    @Test("A truncate to no multiple of 512 is EINVAL")
    func truncateToOddSize() throws {
        let image = try mounted()
        #expect(throws: SystemError.invalid) { _ = try image.truncate(to: Self.size + 511) }
    }

    @Test("A truncate to less is EPERM")
    func truncateToLess() throws {
        let image = try mounted()
        #expect(throws: SystemError(code: EPERM)) { _ = try image.truncate(to: 512) }
    }

    @Test("A truncate to less shrinks the disk where that is allowed")
    func truncateToLessWithShrinking() throws {
        var rules = FileRules()
        rules.allowsShrinking = true
        let image = try mounted(rules: rules)
        #expect(try image.truncate(to: 512) == 512)
    }

    @Test("A read-only disk does not grow")
    func truncateReadOnly() throws {
        let image = try mounted(access: .readOnly)
        #expect(throws: SystemError.readOnly) { _ = try image.truncate(to: Self.size * 2) }
    }

    @Test("A range that is punched reads as a hole")
    func punch() throws {
        let image = try mounted()
        _ = try write(Int(Self.cluster), at: Self.cluster, to: image)
        let punch = try #require(
            AllocationRequest(mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
        try image.allocate(punch, at: Self.cluster, count: Self.cluster)
        #expect(throws: SystemError(code: ENXIO)) { _ = try image.seek(.data, from: 0) }
    }

    @Test("Punching is EOPNOTSUPP where discards are ignored")
    func punchIgnored() throws {
        var rules = FileRules()
        rules.discard = .ignore
        let image = try mounted(rules: rules)
        let punch = try #require(
            AllocationRequest(mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
        #expect(throws: SystemError.notSupported) { try image.allocate(punch, at: 0, count: 512) }
    }

    @Test("Punching past the end is clipped")
    func punchPastEnd() throws {
        let image = try mounted()
        let punch = try #require(
            AllocationRequest(mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
        try image.allocate(punch, at: Self.size - 512, count: 1 << 40)
        #expect(image.size == Self.size)
    }

    @Test("Allocating past the end grows the disk")
    func allocatePastEnd() throws {
        let image = try mounted()
        let plain = try #require(AllocationRequest(mode: 0))
        try image.allocate(plain, at: Self.size, count: 4096)
        #expect(image.size == Self.size + 4096)
    }

    @Test("Allocating past the end keeps the size where that is asked")
    func allocatePastEndKeepingSize() throws {
        let image = try mounted()
        let keeping = try #require(AllocationRequest(mode: FALLOC_FL_KEEP_SIZE))
        try image.allocate(keeping, at: Self.size, count: 4096)
        #expect(image.size == Self.size)
    }

    @Test("A range whose end no number holds is EFBIG")
    func allocateOverflow() throws {
        let image = try mounted()
        let plain = try #require(AllocationRequest(mode: 0))
        #expect(throws: SystemError(code: EFBIG)) {
            try image.allocate(plain, at: 4096, count: .max)
        }
    }

    @Test(
        "Modes that nobody can serve are no request",
        arguments: [FALLOC_FL_PUNCH_HOLE, FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE])
    func unknownModes(mode: Int32) {
        #expect(AllocationRequest(mode: mode) == nil)
    }

    @Test("Data is found where it was written")
    func seekData() throws {
        let image = try mounted()
        _ = try write(512, at: 3 * Self.cluster, to: image)
        #expect(try image.seek(.data, from: 0) == 3 * Self.cluster)
    }

    @Test("The end of a full disk is a hole")
    func seekHole() throws {
        let image = try mounted()
        _ = try write(Int(Self.size), at: 0, to: image)
        #expect(try image.seek(.hole, from: 0) == Self.size)
    }

    @Test("Seeking from the end of the disk on is ENXIO")
    func seekPastEnd() throws {
        let image = try mounted()
        #expect(throws: SystemError(code: ENXIO)) { _ = try image.seek(.hole, from: Self.size) }
    }

    @Test("Zeros are not stored where they are detected")
    func zeroDetection() throws {
        var rules = FileRules()
        rules.zeroDetection = .unmap
        let image = try mounted(rules: rules)
        let zeros = [UInt8](repeating: 0, count: Int(Self.cluster))
        _ = try zeros.withUnsafeBytes { try image.write($0, at: 0) }
        #expect(throws: SystemError(code: ENXIO)) { _ = try image.seek(.data, from: 0) }
    }

    @Test(
        "Bytes that are not all zeros are told from those that are", arguments: [0, 1, 2047, 4095])
    func notAllZeros(position: Int) {
        var bytes = [UInt8](repeating: 0, count: 4096)
        bytes[position] = 1
        #expect(bytes.withUnsafeBytes { !$0.isAllZeros })
    }

    @Test("The preferred size of a request lies between 64 KiB and 1 MiB")
    func preferredSize() throws {
        let image = try mounted()
        #expect(image.attributes().preferredByteCount == 65536)
    }

    @Test("An empty disk is not shown as full")
    func blockCount() throws {
        let image = try mounted()
        #expect(image.attributes().blockCount < Self.size / 512)
    }

    @Test("Space is counted in clusters")
    func space() throws {
        let image = try mounted()
        #expect(image.space().unitByteCount == Self.cluster)
    }
}
