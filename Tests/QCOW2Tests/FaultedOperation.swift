import QCOW2
import TestSupport
import Testing

/// An operation that changes each sector at most once, for faults to interrupt.
struct FaultedOperation: Sendable, CustomTestStringConvertible {
    /// What has been flushed, and so stays whatever fails afterwards.
    typealias Acknowledge = (Range<Int>) -> Void

    let testDescription: String
    var layout = CrashLayout(clusterBits: 9, guestClusters: 192)
    let run: @Sendable (any BlockDevice, CrashLayout, Acknowledge) throws -> Void

    init(
        _ name: String, _ layout: CrashLayout? = nil,
        onDevice run: @escaping @Sendable (any BlockDevice, CrashLayout, Acknowledge) throws -> Void
    ) {
        testDescription = name
        if let layout { self.layout = layout }
        self.run = run
    }

    /// An operation on an open image, which is closed afterwards.
    init(
        _ name: String, _ layout: CrashLayout? = nil,
        _ body: @escaping @Sendable (Image, Acknowledge) throws -> Void
    ) {
        self.init(
            name, layout,
            onDevice: { device, layout, acknowledge in
                let image = try Image.open(device, backing: layout.backing())
                do { try body(image, acknowledge) } catch {
                    try? image.close()
                    throw error
                }
                try image.close()
            })
    }

    // MARK: What clients do

    private static let some = 3..<40
    static let written: UInt64 = 100

    /// Data for new clusters, for parts of them, for shared ones and for old ones.
    private static func write(_ image: Image, _ acknowledge: Acknowledge) throws {
        for (step, start) in stride(from: 0, to: 180, by: 9).enumerated() {
            let sectors = start..<start + 4
            try image.write(
                SectorPattern.bytes(sectors: sectors, value: written), at: sectors.lowerBound * 512)
            try image.discard(UInt64(start + 4) * 512..<UInt64(start + 6) * 512)
            try image.writeZeroes(UInt64(start + 6) * 512..<UInt64(start + 8) * 512)
            if step % 4 == 3 {
                try image.flush()
                acknowledge(0..<start + 8)
            }
        }
    }

    private static func compress(_ image: Image, _ acknowledge: Acknowledge) throws {
        let layout = CrashLayout(clusterBits: 12, guestClusters: 48)
        for cluster in stride(from: 0, to: 48, by: 2) {
            let first = cluster * layout.sectorsPerCluster
            let bytes = SectorPattern.bytes(
                sectors: first..<first + layout.sectorsPerCluster, value: written)
            try Streams.deflate(bytes).withUnsafeBytes {
                try image.writeStream($0, at: UInt64(first * 512))
            }
            if cluster % 16 == 14 {
                try image.flush()
                acknowledge(first..<first + layout.sectorsPerCluster)
            }
        }
    }

    /// Not committed when what follows begins.
    private static func writeSome(_ image: Image) throws {
        try image.write(
            SectorPattern.bytes(sectors: some, value: written), at: some.lowerBound * 512)
    }

    private static func changeBitmap(
        _ device: any BlockDevice, _ name: String, _ changes: [BitmapChange]
    ) throws {
        let image = try Image.open(device)
        do { try image.changeBitmap(Array(name.utf8), changes) } catch {
            try? image.close()
            throw error
        }
        try image.close()
    }

    // MARK: All of them

    private static let plain = CrashLayout(clusterBits: 9, guestClusters: 192, hasSnapshot: false)
    private static let marked = CrashLayout(
        clusterBits: 12, guestClusters: 48, hasSnapshot: false, hasBitmaps: true)

    static let onImages: [FaultedOperation] = [
        .init("write") { try write($0, $1) },
        .init("write over a backing file", CrashLayout.all[1]) { try write($0, $1) },
        .init("write subclusters", CrashLayout.withSubclusters[0]) { try write($0, $1) },
        .init("write with bitmaps", marked) { try write($0, $1) },
        .init("compress", CrashLayout(clusterBits: 12, guestClusters: 48)) { try compress($0, $1) },
        .init("allocate") { image, _ in try image.allocate(0..<96 << 10) },
        .init("create a snapshot") { image, _ in
            try writeSome(image)
            try image.createSnapshot("new")
        },
        .init("apply a snapshot") { image, _ in
            try writeSome(image)
            try image.flush()
            try image.applySnapshot("kept")
        },
        .init("delete a snapshot") { image, _ in
            try writeSome(image)
            try image.deleteSnapshot("kept")
        },
        .init("grow") { image, _ in
            try writeSome(image)
            try image.resize(to: 3 << 20)
        },
        .init("grow with bitmaps", marked) { image, _ in
            try writeSome(image)
            try image.resize(to: 400 << 10)
        },
        .init("grow with space reserved") { image, _ in
            try writeSome(image)
            try image.resize(to: 128 << 10, preallocation: .falloc)
        },
        .init("grow with zeros written", CrashLayout.withSubclusters[0]) { image, _ in
            try writeSome(image)
            try image.resize(to: image.size + 48 << 10, preallocation: .full)
        },
        .init("shrink") { image, _ in
            try writeSome(image)
            try image.resize(to: 40 << 10, shrinking: true)
        },
        .init("reclaim zeros", plain) { image, _ in
            try image.write([UInt8](repeating: 0, count: 48 << 10), at: 0)
            try image.flush()
            _ = try ZeroReclaim.run(on: image)
        },
    ]

    static let onDevices: [FaultedOperation] = [
        .init(
            "add, merge, clear and disable bitmaps", marked,
            onDevice: { device, _, _ in
                try changeBitmap(device, "more", [.add(granularity: 4096), .disable])
                try changeBitmap(device, "more", [.merge(source: "backup", path: nil)])
                try changeBitmap(device, "fine", [.clear])
                try changeBitmap(device, "backup", [.remove])
            }),
        .init(
            "amend the width of counts",
            onDevice: { device, _, _ in try amend(device) { $0.refcountBits = 64 } }),
        .init(
            "amend to version 2",
            onDevice: { device, _, _ in try amend(device) { $0.version = .v2 } }),
        .init(
            "amend to version 3", CrashLayout.all[3],
            onDevice: { device, _, _ in try amend(device) { $0.version = .v3 } }),
        .init("compact", onDevice: { device, _, _ in try compact(device) }),
        .init(
            "compact streams", CrashLayout(clusterBits: 12, guestClusters: 48, hasCompressed: true),
            onDevice: { device, _, _ in try compact(device) }),
        .init("compact bitmaps", marked, onDevice: { device, _, _ in try compact(device) }),
        .init(
            "repair",
            onDevice: { device, _, _ in
                _ = try ImageRepair(on: device, scope: .all, undoPath: nil)
            }),
    ]

    /// What the snapshot held goes, and everything is moved in several steps.
    private static func compact(_ device: any BlockDevice) throws {
        let image = try Image.open(device)
        do {
            if try !image.snapshots().isEmpty { try image.deleteSnapshot("kept") }
            try image.discard(0..<image.size / 3)
        } catch {
            try? image.close()
            throw error
        }
        try image.close()
        try Image.compact(on: device, stepByteCount: 8192) { _ in true }
    }

    private static func amend(
        _ device: any BlockDevice, _ change: (inout AmendOptions) -> Void
    ) throws {
        var options = AmendOptions()
        change(&options)
        try Image.amend(on: device, options: options)
    }
}
