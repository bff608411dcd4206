import Glibc
import QCOW2
import TestSupport
import Testing

@Suite("Bytes at offsets: files and memory")
struct StorageTests {
    let place: FileTree
    init() throws { place = try FileTree() }

    /// The same random writes, holes and lengths on a device and on an array of bytes.
    func walk(_ device: any BlockDevice, seed: UInt64, steps: Int) throws {
        var random = Xorshift(state: seed)
        var model: [UInt8] = []
        for step in 0..<steps {
            let offset = Int(random.next() % 300_000)
            let count = Int(random.next() % 3 == 0 ? random.next() % 100_000 : random.next() % 5000)
            switch random.next() % 8 {
            case 0:
                model = Array(model.prefix(offset))
                model += Array(repeating: 0, count: offset - model.count)
                try device.resize(to: UInt64(offset))
            case 1:
                for index in offset..<max(offset, min(offset + count, model.count)) {
                    model[index] = 0
                }
                try device.punchHole(UInt64(offset)..<UInt64(offset + count))
            default:
                let bytes = (0..<count).map { _ in UInt8(truncatingIfNeeded: random.next()) }
                if count > 0 && model.count < offset + count {
                    model += Array(repeating: 0, count: offset + count - model.count)
                }
                model.replaceSubrange(
                    min(offset, model.count)..<min(offset + count, model.count), with: bytes)
                try bytes.withUnsafeBytes { try device.write($0, at: UInt64(offset)) }
            }
            try #require(try device.byteCount() == UInt64(model.count), "seed \(seed) step \(step)")
            let start = Int(random.next() % 310_000)
            let wanted = Int(random.next() % 60_000)
            let expected = Array(model.dropFirst(start).prefix(wanted))
            let found = try read(device, wanted, at: start)
            try #require(found == expected, "seed \(seed) step \(step)")
        }
    }

    func read(_ device: any BlockDevice, _ count: Int, at offset: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xEE, count: count)
        let found = try bytes.withUnsafeMutableBytes {
            try device.read(into: $0, at: UInt64(offset))
        }
        return Array(bytes.prefix(found))
    }

    @Test("A file holds what was written to it", arguments: 1...4 as ClosedRange<UInt64>)
    func file(seed: UInt64) throws {
        let device = try FileDevice(path: try place.file("a"), access: .readWrite)
        try walk(device, seed: seed, steps: 150)
        try device.flush()
    }

    @Test(
        "So does one whose system transfers less than asked, and is interrupted",
        arguments: 1...4 as ClosedRange<UInt64>)
    func shortTransfers(seed: UInt64) throws {
        let device = try FileDevice(path: try place.file("a"), access: .readWrite)
        try withShortTransfers { try walk(device, seed: seed, steps: 150) }
    }

    @Test(
        "So does one past the page cache, with any alignment",
        arguments: 1...4 as ClosedRange<UInt64>)
    func direct(seed: UInt64) throws {
        let device = try FileDevice(
            path: try place.file("a"), access: .readWrite, bypassesPageCache: true)
        #expect(device.mappedBytes == nil)
        try walk(device, seed: seed, steps: 150)
    }

    @Test("So does memory", arguments: 1...4 as ClosedRange<UInt64>)
    func memory(seed: UInt64) throws { try walk(RAMDisk(), seed: seed, steps: 300) }

    @Test("Writes at odd offsets from several threads past the page cache lose nothing")
    func directThreads() async throws {
        let path = try place.file("a")
        let device = try FileDevice(path: path, access: .readWrite, bypassesPageCache: true)
        try await withThrowingTaskGroup(of: Void.self) { group in
            for part in 0..<4 {
                group.addTask {
                    for index in 0..<40 {
                        let bytes = [UInt8](repeating: UInt8(part + 1), count: 1000)
                        try bytes.withUnsafeBytes {
                            try device.write($0, at: UInt64((index * 4 + part) * 1000))
                        }
                    }
                }
            }
            try await group.waitForAll()
        }
        #expect(try device.byteCount() == 160_000)
        for index in 0..<160 {
            let expected = [UInt8](repeating: UInt8(index % 4 + 1), count: 1000)
            try #require(try read(device, 1000, at: index * 1000) == expected)
        }
    }

    @Test("The mapping shows what is written, growth included")
    func mapping() throws {
        let device = try FileDevice(path: try place.file("a", [1, 2, 3]), access: .readWrite)
        let mapped = try #require(device.mappedBytes)
        #expect(mapped.count > 1 << 30)
        #expect(Array(mapped[..<3]) == [1, 2, 3])
        try [UInt8](repeating: 7, count: 10).withUnsafeBytes { try device.write($0, at: 1 << 20) }
        #expect(mapped[1 << 20] == 7)
    }

    @Test("A sparse file in memory is not mapped: reading its holes would fill the memory")
    func sparseInMemory() throws {
        guard TestEnvironment.scratch == "/dev/shm" else { return }
        let folder = try TemporaryDirectory()
        let device = try FileDevice(creating: folder.file("sparse"))
        #expect(device.mappedBytes != nil)
        try device.resize(to: 1 << 30)
        let again = try FileDevice(path: folder.file("sparse"), access: .readOnly)
        #expect(again.mappedBytes == nil)
    }

    @Test("Holes are found in files and in memory")
    func holes() throws {
        for device: any BlockDevice in [
            try FileDevice(path: try place.file("a"), access: .readWrite), RAMDisk(),
        ] {
            try device.resize(to: 4 << 20)
            let bytes = [UInt8](repeating: 1, count: 65536)
            try bytes.withUnsafeBytes { try device.write($0, at: 1 << 20) }
            #expect(try device.nextData(from: 0) == 1 << 20)
            #expect(try device.nextHole(from: 1 << 20) == 1 << 20 + 65536)
            #expect(try device.nextData(from: 2 << 20) == nil)
            #expect(try device.nextHole(from: 2 << 20) == 2 << 20)
            #expect(try device.nextData(from: 9 << 20) == nil)
            #expect(try device.nextHole(from: 9 << 20) == 9 << 20)
        }
    }

    @Test("Reading past the end gives nothing, also at absurd offsets")
    func pastTheEnd() throws {
        for device: any BlockDevice in [
            try FileDevice(path: try place.file("a", [1]), access: .readOnly),
            try FileDevice(
                path: try place.file("a", [1]), access: .readOnly, bypassesPageCache: true),
            RAMDisk(byteCount: 1),
        ] {
            for offset in [1, 4096, UInt64(Int64.max) - 1, UInt64(Int64.max), .max] {
                var bytes = [UInt8](repeating: 0, count: 100)
                let count = bytes.withUnsafeMutableBytes { try? device.read(into: $0, at: offset) }
                #expect(count == nil || count == 0)
            }
        }
    }

    @Test("What is no file is refused at once, in words")
    func specialFiles() throws {
        mkfifo("\(place.path)/fifo", 0o600)
        for (path, word) in [
            (place.path, "directory"), ("\(place.path)/fifo", "FIFO"),
            ("/dev/zero", "character device"), ("\(place.path)/none", "No such file"),
        ] {
            do throws(ImageError) {
                _ = try FileDevice(path: path, access: .readOnly)
                Issue.record("\(path) was opened")
            } catch { #expect(error.description.contains(word)) }
        }
    }
}

/// A small repeatable source of random numbers.
struct Xorshift {
    var state: UInt64
    mutating func next() -> UInt64 {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        return state
    }
}

@Suite("The byte locks QEMU honours")
struct ImageLockTests {
    let place: FileTree
    let path: String
    init() throws {
        place = try FileTree()
        path = try place.file("a.qcow2")
    }

    func device() throws -> FileDevice { try FileDevice(path: path, access: .readOnly) }

    func expectLocked(
        _ mode: ImageLock.Mode, _ device: FileDevice,
        sourceLocation: SourceLocation = #_sourceLocation
    ) {
        do throws(ImageError) {
            try ImageLock.take(mode, on: device)
            Issue.record("was let in", sourceLocation: sourceLocation)
        } catch {
            guard case .locked(let holder, let wanted) = error.kind else {
                Issue.record("\(error)", sourceLocation: sourceLocation)
                return
            }
            #expect(wanted == (mode == .writer ? .write : .read), sourceLocation: sourceLocation)
            #expect(holder?.contains("pid \(getpid())") == true, sourceLocation: sourceLocation)
        }
    }

    @Test("Readers share, a writer is alone, force-share gets in anywhere")
    func matrix() throws {
        let first = try device()
        let second = try device()
        let third = try device()
        #expect(try ImageLock.take(.reader, on: first) == .held)
        #expect(try ImageLock.take(.reader, on: second) == .held)
        expectLocked(.writer, third)
        first.close()
        expectLocked(.writer, third)
        ImageLock.drop(.reader, on: second)
        #expect(try ImageLock.take(.writer, on: third) == .held)
        expectLocked(.reader, second)
        expectLocked(.writer, second)
        #expect(try ImageLock.take(.forceShare, on: second) == .held)
    }

    @Test("A refused lock leaves nothing locked behind")
    func refusalLeavesNothing() throws {
        let holder = try device()
        let refused = try device()
        try ImageLock.take(.reader, on: holder)
        expectLocked(.writer, refused)
        holder.close()
        let next = try device()
        #expect(try ImageLock.take(.writer, on: next) == .held)
    }

    @Test("Looking takes nothing")
    func looking() throws {
        let writer = try device()
        let other = try device()
        #expect(try !ImageLock.isContested(.writer, on: other))
        try ImageLock.take(.writer, on: writer)
        #expect(try ImageLock.isContested(.reader, on: other))
        writer.close()
        #expect(try !ImageLock.isContested(.reader, on: other))
    }
}
