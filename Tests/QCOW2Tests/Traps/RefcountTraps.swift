import QCOW2
import TestSupport
import Testing

/// Traps 38 to 53: counts, and the blocks and tables that hold them.
@Suite("Traps of refcounts")
struct RefcountTraps {
    @Test("Trap 38: counts below a byte lie from the least significant bit up", arguments: 0...6)
    func widths(order: Int) {
        let format = RefcountFormat(order: UInt32(order))
        var random = RepeatableRandom(seed: TestEnvironment.seed &+ UInt64(order))
        var block = [UInt8](repeating: 0, count: 512)
        let bits = 1 << order
        var model = [UInt64](repeating: 0, count: 512 * 8 / bits)
        for _ in 0..<4000 {
            let index = random.number(below: model.count)
            model[index] = random.next() & format.maximum
            block.withUnsafeMutableBytes { format.store(model[index], at: index, in: $0) }
        }
        let stored = block.withUnsafeBytes { bytes in
            model.indices.map { format.count(at: $0, in: bytes) }
        }
        #expect(stored == model, "seed \(TestEnvironment.seed)")
        // Bit by bit, by the format's own words.
        let spelled = model.indices.map { index in
            let bytes = block[index * bits / 8..<max(index * bits / 8 + 1, (index + 1) * bits / 8)]
            let word = bytes.reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
            return word >> UInt64(bits < 8 ? index * bits % 8 : 0) & format.maximum
        }
        #expect(spelled == model, "seed \(TestEnvironment.seed)")
    }

    @Test(
        "Trap 38: QEMU's counts of 1, 1, 1, 1, 2, 2, 1, 1 are read as such",
        arguments: [
            (1, [0x55, 0x5A]), (2, [0x11, 0x11, 0x22, 0x11]), (3, [1, 1, 1, 1, 2, 2, 1, 1]),
        ] as [(UInt32, [UInt8])])
    func examples(order: UInt32, bytes: [UInt8]) {
        let format = RefcountFormat(order: order)
        let counts = bytes.withUnsafeBytes { bytes in
            (0..<8).map { format.count(at: $0, in: bytes) }
        }
        #expect(counts == [1, 1, 1, 1, 2, 2, 1, 1])
    }

    @Test("A refcount block past the end of the file is damage, not a range of free clusters")
    func blockPastTheEnd() throws {
        var bytes = filled(64.KiB, clusterBits: 9).build()
        let table = Int(bytes.number(at: 48, as: UInt64.self))
        bytes.put(UInt64(1 << 30), at: table)
        let device = RecordingDevice(bytes, yielding: false)
        #expect(throws: ImageError.self) { try Image.open(device) }
        #expect(device.bytes == bytes)
        let image = try Image.open(device, options: .readOnly)
        #expect(try image.bytes(0..<512) == [UInt8](repeating: 1, count: 512))
        try image.close()
    }

    @Test("Trap 39: entries of the refcount table are offsets and nothing else")
    func plainTableEntries() throws {
        // 256 counts a block: 1 MiB needs nine blocks.
        let device = RecordingDevice(
            ImageBuilder(byteCount: 1.MiB, clusterBits: 9).build(), yielding: false)
        var image = try Image.open(device)
        for start in stride(from: 0, to: 1.MiB, by: 64.KiB) {
            try image.write([UInt8](repeating: UInt8(start >> 16 + 1), count: 64.KiB), at: start)
        }
        try image.close()
        var blocks = 0
        for index in 0..<64 {
            let table = Int(device.bytes.number(at: 48, as: UInt64.self))
            let entry = device.bytes.number(at: table + index * 8, as: UInt64.self)
            #expect(entry % 512 == 0 && entry < device.bytes.count, "entry \(index)")
            if entry != 0 { blocks += 1 }
        }
        #expect(blocks >= 9)
        image = try Image.open(device)
        for start in stride(from: 0, to: 1.MiB, by: 64.KiB) {
            #expect(try reads(image, start..<start + 64.KiB, UInt8(start >> 16 + 1)))
        }
        try image.discard(0..<UInt64(512.KiB))
        try image.close()
        try expectSound(device)
    }

    @Test(
        "Trap 40: where there is no room for a new table, nothing refers to it",
        .needsQemuImg, arguments: [false, true])
    func noRoomForTables(lasts: Bool) throws {
        let folder = try TemporaryDirectory()
        let builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 9, refcountOrder: 6)
        var call = 0
        while true {
            let device = RecordingDevice(builder.build(), yielding: false)
            let fault = FaultyDevice.Fault(
                .write, call: call, error: .noSpace, lasts: lasts, storing: call % 3 * 100)
            let faulty = FaultyDevice(device, fault)
            let image = try Image.open(faulty)
            // Each lands under an L2 table of its own; soon there must be a new block too.
            for index in 0..<16 {
                try? image.write([UInt8](repeating: 1, count: 1024), at: index * 64.KiB + 512)
                if index % 4 == 3 { try? image.flush() }
            }
            try? image.close()
            guard faulty.failed else { break }
            let path = try folder.write(device.bytes, to: "disk.qcow2")
            let check = try QemuImg.check(path)
            try #require(check.status == 0 || check.status == 3, "write \(call): \(check)")
            try Command.require("rm", path)
            call += 1
        }
        #expect(call > 40, "only \(call) writes")
    }

    @Test(
        "Trap 45: a new refcount block counts itself, at every point of growth",
        .needsQemuImg)
    func blocksCountThemselves() throws {
        let builder = ImageBuilder(byteCount: 3.MiB, clusterBits: 9, refcountOrder: 6)
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        for start in stride(from: 0, to: 3.MiB, by: 128.KiB) {
            try image.write([UInt8](repeating: 0x42, count: 128.KiB), at: start)
            try image.flush()
            try device.bytes.withUnsafeBytes { bytes in
                let reader = try ReferenceReader(bytes)
                for index in 0..<reader.refcountTableClusters * 64 {
                    let block = Int(reader.number(reader.refcountTableOffset + index * 8))
                    #expect(block == 0 || reader.refcount(of: block / 512) == 1, "block \(index)")
                }
                try #require(reader.audit().faults == [], "after \(start)")
            }
        }
        try image.close()
        try expectSound(device)
        let folder = try TemporaryDirectory()
        let check = try QemuImg.check(folder.write(device.bytes, to: "disk.qcow2"))
        #expect(check.status == 0, "\(check)")
    }

    @Test(
        "Trap 47: a cluster that a new refcount block takes is given to nobody else",
        arguments: 0...4)
    func fullBlock(free: Int) throws {
        // 64 counts a block; data until the last block has only `free` left.
        var builder = ImageBuilder(byteCount: 256.KiB, clusterBits: 9, refcountOrder: 6)
        var filled = 0
        repeat {
            builder.fill(UInt8(filled & 0x7F + 1), guestCluster: filled)
            filled += 1
        } while (builder.build().count / 512 + free) % 64 != 0
        let device = RecordingDevice(builder.build(), yielding: false)
        let image = try Image.open(device)
        let end = filled + 200
        for cluster in filled..<end {
            try image.write(
                [UInt8](repeating: UInt8(cluster & 0x7F + 1), count: 512), at: cluster * 512)
        }
        for cluster in 0..<end {
            #expect(
                try reads(image, cluster * 512..<(cluster + 1) * 512, UInt8(cluster & 0x7F + 1)))
        }
        try image.close()
        try expectSound(device)
    }

    @Test(
        "Trap 50: broken counts never make a cluster of metadata, or the first one, a data cluster",
        arguments: ["header", "L1 table", "L2 table", "refcount table", "refcount block"])
    func brokenCounts(of structure: String) throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 12)
        builder.fill(0x11, guestCluster: 0)
        let l2 = builder.entryOffset(0)
        var bytes = builder.build()
        let table = Int(bytes.number(at: 48, as: UInt64.self))
        let block = Int(bytes.number(at: table, as: UInt64.self))
        let host =
            switch structure {
            case "header": 0
            case "L1 table": builder.l1Offset
            case "L2 table": l2
            case "refcount table": table
            default: block
            }
        bytes.put(UInt16(0), at: block + host / 4096 * 2)
        let device = RecordingDevice(bytes, yielding: false)
        // Of what the header points to, the counts are looked at first.
        if ["header", "L1 table", "refcount table"].contains(structure) {
            #expect(throws: ImageError.self) { try Image.open(device) }
            return #expect(device.bytes == bytes)
        }
        let image = try Image.open(device)
        for cluster in 1..<100 {
            do { try image.write([UInt8](repeating: 0x22, count: 4096), at: cluster * 4096) } catch
            {
                break
            }
        }
        try? image.flush()
        try? image.close()
        #expect(Array(device.bytes[..<72]) == Array(bytes[..<72]))
        try device.bytes.withUnsafeBytes { after in
            let reader = try ReferenceReader(after)
            #expect(try reader.read(0..<4096).allSatisfy { $0 == 0x11 })
            for cluster in 1..<100 {
                let content = try reader.read(cluster * 4096..<(cluster + 1) * 4096)
                #expect(Set(content).isSubset(of: content[0] == 0 ? [0] : [0x22]))
            }
        }
    }

    @Test(
        "Where counts say that a table is free, what they say of data before it is not believed",
        arguments: [64, 384])
    func countsOfTableAndData(last: Int) throws {
        // The last L2 table lies behind the data of the one before it; 256 counts a block.
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 9)
        let free = last - 1
        for cluster in 0...last where cluster != free { builder.fill(0x11, guestCluster: cluster) }
        let table = builder.entryOffset(last) / 512
        var bytes = builder.build()
        let entry = Int(bytes.number(at: 48, as: UInt64.self)) + table / 256 * 8
        let block = Int(bytes.number(at: entry, as: UInt64.self))
        for cluster in table - 40...table { bytes.put(UInt16(0), at: block + cluster % 256 * 2) }
        let device = RecordingDevice(bytes, yielding: false)
        let image = try Image.open(device)
        let error = #expect(throws: ImageError.self) { try image.write([0x22], at: free * 512) }
        #expect("\(try #require(error))".contains("is 0"))
        try? image.close()
        try device.bytes.withUnsafeBytes { after in
            let reader = try ReferenceReader(after)
            #expect(try reader.read(0..<free * 512).allSatisfy { $0 == 0x11 })
            #expect(try reader.read(last * 512..<(last + 1) * 512).allSatisfy { $0 == 0x11 })
        }
    }

    @Test("A refcount block under two entries of the refcount table is not written to")
    func blockTwice() throws {
        var builder = ImageBuilder(byteCount: 1.MiB, clusterBits: 9)
        for cluster in 0..<600 { builder.fill(0x11, guestCluster: cluster) }
        var bytes = builder.build()
        let table = Int(bytes.number(at: 48, as: UInt64.self))
        bytes.put(bytes.number(at: table, as: UInt64.self), at: table + 8)
        let device = RecordingDevice(bytes, yielding: false)
        #expect(throws: ImageError.self) { try Image.open(device) }
        try Image.open(device, options: .readOnly).close()
    }

    @Test(
        "Trap 53: COPIED is set wherever there is one reference, after every kind of change",
        .needsQemuImg, arguments: [UInt32(2), 3])
    func copiedFlags(version: UInt32) throws {
        var builder = ImageBuilder(byteCount: 256.KiB, version: version, clusterBits: 9)
        for cluster in 0..<40 { builder.fill(UInt8(cluster + 1), guestCluster: cluster) }
        builder.compress([UInt8](repeating: 0x5C, count: 512), guestCluster: 50)
        let changes: [(String, (Image) throws -> Void)] = [
            ("a new cluster", { try $0.write([1], at: 60 * 512) }),
            ("a new table", { try $0.write([UInt8](repeating: 1, count: 9000), at: 100_000) }),
            ("a write in place", { try $0.write([2], at: 5) }),
            ("a compressed cluster", { try $0.write([3], at: 50 * 512) }),
            ("zeros that keep their space", { try $0.writeZeroes(512..<4096, keepingSpace: true) }),
            ("a write over such zeros", { try $0.write([4], at: 1024) }),
            ("zeros", { try $0.writeZeroes(4096..<8192) }),
            ("a discard", { try $0.discard(8192..<9728) }),
            ("a write over those", { try $0.write([5], at: 9000) }),
            ("space for clusters", { try $0.allocate(120_000..<130_000) }),
            ("a longer L1 table", { try $0.resize(to: UInt64(8.MiB)) }),
            ("a write at the new end", { try $0.write([6], at: 8.MiB - 1) }),
            ("a shorter disk", { try $0.resize(to: UInt64(128.KiB), shrinking: true) }),
        ]
        let folder = try TemporaryDirectory()
        for hasSnapshot in [false, true] {
            var bytes = builder.build()
            if hasSnapshot {
                builder.snapshot("kept")
                bytes = builder.build()
            }
            for (what, change) in changes {
                if hasSnapshot && version == 2 && what.hasPrefix("a longer") { break }
                let device = RecordingDevice(bytes, yielding: false)
                let image = try Image.open(device)
                try change(image)
                try image.close()
                bytes = device.bytes
                try expectSound(device, what)
                let check = try QemuImg.check(folder.write(bytes, to: "disk.qcow2"))
                #expect(check.status == 0, "\(what): \(check)")
            }
        }
    }
}
