import Foundation
import QCOW2
import Synchronization
import TestSupport
import Testing

@Suite("Images in a server's tasks")
struct ImageThreadsTests {
    @Test("reads that block leave Swift's own threads free")
    func blocked() async throws {
        let device = GatedDevice()
        try Image.create(on: device, size: 1 << 20)
        let image = try Image.open(device)
        try image.write([UInt8](repeating: 7, count: 65536), at: 0)
        let threads = try ImageThreads(count: 16)
        device.shut()
        let read = (0..<16).map { number in
            Task {
                try await threads.run { () throws(ImageError) in
                    try image.read(at: UInt64(number) * 4096, count: 4096)
                }
            }
        }
        while device.waiting < 16 { try await Task.sleep(for: .milliseconds(1)) }
        // More tasks than the machine has threads for all get their turn meanwhile.
        let sum = await withTaskGroup(of: Int.self) { group in
            for number in 0..<200 { group.addTask { number } }
            return await group.reduce(0, +)
        }
        #expect(sum == 199 * 100 && device.waiting == 16)
        device.open()
        for task in read {
            #expect(try await task.value == [UInt8](repeating: 7, count: 4096))
        }
    }

    @Test("an error comes as what it is")
    func error() async throws {
        let device = RAMDisk()
        try Image.create(on: device, size: 1 << 20)
        let image = try Image.open(device)
        let threads = try ImageThreads(count: 1)
        await #expect(throws: ImageError.self) {
            try await threads.run { () throws(ImageError) in
                _ = try image.read(at: 1 << 20, count: 1)
            }
        }
    }

    @Test("one thread runs a thousand tasks in their order")
    func order() async throws {
        let threads = try ImageThreads(count: 1)
        let seen = Order()
        let tasks = (0..<1000).map { number in
            Task(executorPreference: threads) { seen.append(number) }
        }
        for task in tasks { await task.value }
        #expect(seen.numbers == Array(0..<1000))
    }

    @Test("threads end with the last reference")
    func end() async throws {
        func threadCount() throws -> Int {
            try FileManager.default.contentsOfDirectory(atPath: "/proc/self/task").count
        }
        let before = try threadCount()
        for _ in 0..<50 {
            let threads = try ImageThreads(count: 8)
            #expect(await threads.run { 1 } == 1)
        }
        for _ in 0..<500 where try threadCount() > before + 8 {
            try await Task.sleep(for: .milliseconds(10))
        }
        #expect(try threadCount() <= before + 8)
    }
}

private final class Order: Sendable {
    private let state = Mutex<[Int]>([])
    var numbers: [Int] { state.withLock { $0 } }
    func append(_ number: Int) { state.withLock { $0.append(number) } }
}

/// A device whose reads wait while it is closed.
private final class GatedDevice: BlockDevice {
    private let memory = RAMDisk()
    private let gate = Monitor((isOpen: true, waiting: 0))
    let name = "gated"

    var waiting: Int { gate.withLock { $0.waiting } }

    func open() {
        gate.withLock { $0.isOpen = true }
        gate.announceChange()
    }

    /// Reads wait from here on.
    func shut() { gate.withLock { $0.isOpen = false } }

    func byteCount() throws(SystemError) -> UInt64 { try memory.byteCount() }
    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(SystemError)
        -> Int
    {
        gate.withLock { $0.waiting += 1 }
        gate.waitFor { $0.isOpen ? () : nil }
        gate.withLock { $0.waiting -= 1 }
        return try memory.read(into: buffer, at: offset)
    }
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemError) {
        try memory.write(bytes, at: offset)
    }
    func flush() throws(SystemError) {}
    func resize(to byteCount: UInt64) throws(SystemError) { try memory.resize(to: byteCount) }
}
