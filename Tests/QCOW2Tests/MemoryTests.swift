import Foundation
import QCOW2
import TestSupport
import Testing

/// Memory that cannot be had is an error like any other.
@Suite("Missing memory")
struct MemoryTests {
    @Test("The memory of a closed image's tables is free again")
    func closed() throws {
        // 2 PiB: an L1 table of 32 MiB.
        let device = RAMDisk()
        try Image.create(on: device, size: 2 << 50, options: CreateOptions())
        func open() throws { try Image.open(device).close() }
        try open()
        let before = try residentByteCount
        for _ in 0..<20 { try open() }
        #expect(try residentByteCount - before < 320 << 20)
    }

    /// What of this process is in memory, by `/proc/self/statm`.
    private var residentByteCount: Int {
        get throws {
            let words = try String(contentsOfFile: "/proc/self/statm", encoding: .utf8).split(
                separator: " ")
            return try #require(Int(words[1])) * 4096
        }
    }

    @Test("A table that no memory can hold is refused with what it is for")
    func table() throws {
        let error = try #require(throws: ImageError.self) {
            // 8 PiB: more than a process can address, however much the kernel promises.
            _ = try AtomicArray(count: 1 << 50, for: "a test").count
        }
        #expect(error.code == ENOMEM)
        #expect(error.description.hasPrefix("memory for a test: "))
    }
}
