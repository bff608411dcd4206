import Glibc
import QCOW2
import TestSupport
import Testing

/// Memory that cannot be had is an error like any other.
@Suite("Missing memory")
struct MemoryTests {
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
