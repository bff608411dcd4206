import Glibc
import TestSupport
import Testing

/// Runs the program under test.
func qcowfs(_ words: String..., timeout: Double = 60) throws -> Command.Result {
    try Command.run([TestEnvironment.program] + words, timeout: timeout)
}

/// Expects exit status 1 and exactly one line on stderr, `qcowfs: …`, with all of `words` in it.
func expectRefusal(
    _ result: Command.Result, naming words: String...,
    sourceLocation: SourceLocation = #_sourceLocation
) {
    let lines = result.errors.split(separator: "\n", omittingEmptySubsequences: false)
    #expect(result.status == 1, "\(result)", sourceLocation: sourceLocation)
    #expect(
        lines.count == 2 && lines[1].isEmpty && lines[0].hasPrefix("qcowfs: "),
        "\(result)", sourceLocation: sourceLocation)
    #expect(result.output.isEmpty, "\(result)", sourceLocation: sourceLocation)
    for word in words {
        #expect(
            result.errors.lowercased().contains(word.lowercased()),
            "the message does not name \(word): \(result)", sourceLocation: sourceLocation)
    }
}

/// Expects that mounting `image` is refused, and that nothing is left mounted.
func expectMountRefused(
    _ image: String, in folder: TemporaryDirectory, options: [String] = [],
    naming words: [String], sourceLocation: SourceLocation = #_sourceLocation
) throws {
    let mountpoint = folder.file("refused")
    mkdir(mountpoint, 0o755)
    let result = try Command.run(
        [TestEnvironment.program, "mount"] + options + [image, mountpoint], timeout: 30)
    if result.status == 0 {
        _ = try qcowfs("umount", mountpoint)
        Issue.record("it was mounted", sourceLocation: sourceLocation)
        return
    }
    expectRefusal(result, sourceLocation: sourceLocation)
    for word in words {
        #expect(
            result.errors.lowercased().contains(word.lowercased()),
            "the message does not name \(word): \(result)", sourceLocation: sourceLocation)
    }
    #expect(!TestMount.isMountpoint(mountpoint), sourceLocation: sourceLocation)
}

/// Waits until `condition` holds, at most `seconds`.
func eventually(within seconds: Double = 10, _ condition: () throws -> Bool) rethrows -> Bool {
    for _ in 0..<Int(seconds * 100) {
        if try condition() { return true }
        usleep(10_000)
    }
    return try condition()
}

/// A small image with a known beginning, made by QEMU.
func makeImage(
    _ path: String, size: Int = 8 * 1024 * 1024, options: [String] = [],
    commands: [String] = ["write -q -P 0xA1 0 128k", "write -q -P 0xA2 1M 64k"]
) throws {
    try QemuImg.create(path, size: size, options: options)
    if !commands.isEmpty { try QemuImg.io(path, commands) }
}

/// Whether every byte of `range` of `file` is `byte`.
func holds(_ file: TestFile, _ range: Range<Int>, _ byte: UInt8) throws -> Bool {
    let bytes = try file.read(range)
    return bytes.count == range.count && bytes.allSatisfy { $0 == byte }
}

/// Whether a process is there and has not ended: one that only waits to be reaped has.
func isRunning(_ pid: Int32) -> Bool {
    guard let file = try? TestFile("/proc/\(pid)/stat", O_RDONLY),
        let line = try? String(decoding: file.read(0..<4096), as: UTF8.self)
    else { return false }
    // The state stands behind the name, which is in parentheses and may hold anything.
    return line.split(separator: ")").last?.split(separator: " ").first != "Z"
}

/// Keeps qemu-io open on `path` while `body` runs, which gets its process id.
func whileQEMUHas(
    _ path: String, format: String = "qcow2", flags: [String] = [],
    _ body: (_ process: pid_t) throws -> Void
) throws {
    var ends: [Int32] = [0, 0]
    try #require(pipe2(&ends, O_CLOEXEC) == 0)
    let holder = try Command.start(
        ["qemu-io", "-f", format] + flags + [path], input: "/proc/self/fd/\(ends[0])")
    defer {
        close(ends[0])
        close(ends[1])
    }
    _ = "read -q 0 512\n".withCString { write(ends[1], $0, strlen($0)) }
    // Writes are not shared with others; raw disks leave that to whoever writes.
    let byte = format == "raw" ? 101 : 201
    #expect(eventually { isLocked(path, byte: byte) })
    do { try body(holder.pid) } catch { Issue.record(error) }
    _ = "quit\n".withCString { write(ends[1], $0, strlen($0)) }
    _ = try holder.wait(timeout: 20)
}

/// Whether somebody holds `byte`, one of those that QEMU locks.
private func isLocked(_ path: String, byte: Int) -> Bool {
    guard let file = try? TestFile(path, O_RDWR) else { return false }
    var lock = flock()
    lock.l_type = Int16(F_WRLCK)
    lock.l_whence = Int16(SEEK_SET)
    lock.l_start = byte
    lock.l_len = 1
    return fcntl(file.descriptor, F_OFD_GETLK, &lock) == 0 && lock.l_type != Int16(F_UNLCK)
}
