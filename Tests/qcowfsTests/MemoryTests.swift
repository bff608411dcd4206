import TestSupport
import Testing

/// The program where there is less memory than an image's tables need.
@Suite("Little memory", .enabled(if: TestEnvironment.has("prlimit"), "prlimit is missing"))
struct MemoryTests {
    @Test("Tables that do not fit in memory are an error of one line")
    func tables() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        // Its L1 table takes 32 MiB.
        #expect(try qcowfs("create", image, "2P").status == 0)
        var refusals = 0
        for mebibytes in stride(from: 45, through: 95, by: 10) {
            let result = try Command.run([
                "prlimit", "--as=\(mebibytes << 20)", TestEnvironment.program, "read", "--offset",
                "0", "--length", "1", image,
            ])
            // Too little for the program to start at all.
            if result.status == 127 { continue }
            expectRefusal(result, naming: image, "Cannot allocate memory")
            refusals += 1
        }
        #expect(refusals > 0)
    }
}
