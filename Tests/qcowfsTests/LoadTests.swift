import Foundation
import TestSupport
import Testing

/// Many mounts, many cycles, little memory.
@Suite("Load", .serialized, .enabledWhereMountable)
struct LoadTests {
    @Test("thirty-two mounted images keep what fio writes to all of them at once")
    func manyImages() throws {
        let folder = try TemporaryDirectory()
        let images = try (0..<32).map { number in
            let path = folder.file("disk\(number).qcow2")
            try QemuImg.create(
                path, size: 64.MiB, options: ["cluster_size=\(4096 << (number % 5))"])
            return path
        }
        // One daemon has half of them, the others have one each.
        let shared = folder.file("shared")
        mkdir(shared, 0o755)
        var mounts = [try TestMount(Array(images[..<16]), on: shared)]
        for (number, image) in images[16...].enumerated() {
            let mountpoint = folder.file("mnt\(number)")
            mkdir(mountpoint, 0o755)
            mounts.append(try TestMount([image], on: mountpoint))
        }
        let disks =
            images[..<16].map { shared + "/" + TestMount.diskName(of: $0) }
            + mounts[1...].map(\.disk)
        try verify(disks, megabytes: TestEnvironment.isLong ? 48 : 6)
        for mount in mounts { try mount.unmount() }
        for image in images {
            let check = try QemuImg.check(image)
            #expect(check.status == 0, "\(check)")
        }
    }

    /// Writes at random and reads back, all disks at once.
    private func verify(_ disks: [String], megabytes: Int) throws {
        var words = [
            "fio", "--rw=randwrite", "--bs=4k", "--ioengine=psync", "--size=\(megabytes)M",
            "--verify=crc32c", "--verify_fatal=1", "--fsync=200",
            "--randseed=\(TestEnvironment.seed)",
            "--output-format=terse",
        ]
        for (number, disk) in disks.enumerated() {
            words += ["--name=disk\(number)", "--filename=\(disk)"]
        }
        try Command.require(words, timeout: 600)
    }

    @Test("mounting and unmounting leaves no process, no mount and no descriptor behind")
    func cycles() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try makeImage(path)
        let before = try descriptors()
        for round in 0..<(TestEnvironment.isLong ? 1000 : 100) {
            let mount = try TestMount(path, in: folder)
            let file = try mount.open()
            try file.write([UInt8](repeating: UInt8(round & 255), count: 4096), at: round * 4096)
            #expect(try holds(file, round * 4096..<(round + 1) * 4096, UInt8(round & 255)))
            if round % 10 == 0 { try file.sync() }
            _ = consume file
            try mount.unmount()
            try #require(TestMount.daemons(naming: mount.mountpoint) == [], "round \(round)")
            try #require(!TestMount.isMountpoint(mount.mountpoint), "round \(round)")
        }
        #expect(try descriptors() == before)
        let check = try QemuImg.check(path)
        #expect(check.status == 0, "\(check)")
    }

    private func descriptors() throws -> Int {
        try FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd").count
    }

    @Test("two threads are enough for writers, syncs, holes and searches at once")
    func fewestThreads() throws {
        let folder = try TemporaryDirectory()
        let path = folder.file("disk.qcow2")
        try makeImage(path, size: 64.MiB, options: ["cluster_size=4k"])
        let mount = try TestMount(path, in: folder, options: ["--threads", "2"])
        let rounds = TestEnvironment.isLong ? 20_000 : 400
        try onThreads(8) { thread in
            let file = try mount.open()
            var random = RepeatableRandom(seed: TestEnvironment.seed &+ UInt64(thread))
            let own = thread * 8.MiB
            for round in 0..<rounds {
                let place = own + random.number(below: 2000) * 4096
                switch (thread + round) % 5 {
                case 0: try file.sync()
                case 1: try file.punch(place..<place + 16384)
                case 2: _ = try file.nextData(from: random.number(below: 64.MiB))
                case 3: try file.allocate(0, place..<place + 8192)
                default: try file.write([UInt8](repeating: 7, count: 4096), at: place)
                }
            }
        }
        try mount.unmount()
        let check = try QemuImg.check(path)
        #expect(check.status == 0, "\(check)")
    }

    @Test("a daemon with little memory goes on, and its own memory does not grow")
    func littleMemory() throws {
        // On a disk: a file in memory would count, and could not be written out.
        let folder = try TemporaryDirectory(in: "/var/tmp")
        let path = folder.file("disk.qcow2")
        try makeImage(path, size: 512.MiB)
        let group = try MemoryGroup(byteCount: 96.MiB)
        let mountpoint = folder.file("mnt")
        mkdir(mountpoint, 0o755)
        try Command.shell(
            "echo $$ > \(group.members) && exec '\(TestEnvironment.program)' mount '\(path)' "
                + "'\(mountpoint)'")
        let mount = TestMount(existing: path, on: mountpoint)
        try verify([mount.disk], megabytes: 160)
        let first = try ownMemory(of: mount.daemon())
        try verify([mount.disk], megabytes: TestEnvironment.isLong ? 480 : 160)
        let second = try ownMemory(of: mount.daemon())
        #expect(second < first + 8.MiB, "it has grown from \(first) to \(second) bytes")
        #expect(second < 96.MiB)
        try mount.unmount()
        let check = try QemuImg.check(path)
        #expect(check.status == 0, "\(check)")
    }

    /// RssAnon in bytes: what is not page cache.
    private func ownMemory(of pid: pid_t) throws -> Int {
        let status = try String(contentsOfFile: "/proc/\(pid)/status", encoding: .utf8)
        let line = status.split(separator: "\n").first { $0.hasPrefix("RssAnon:") } ?? ""
        return (line.split(whereSeparator: { !$0.isNumber }).first.flatMap { Int($0) } ?? 0) * 1024
    }
}

/// A control group whose processes share a bound of memory, page cache included.
private final class MemoryGroup {
    private let folder: String
    /// The file that takes the number of a process that joins.
    let members: String

    init(byteCount: Int) throws {
        let isFirstVersion = access("/sys/fs/cgroup/memory/tasks", F_OK) == 0
        let root = isFirstVersion ? "/sys/fs/cgroup/memory" : "/sys/fs/cgroup"
        folder = "\(root)/qcowfs-\(getpid())"
        members = folder + "/cgroup.procs"
        mkdir(folder, 0o755)
        let limit = isFirstVersion ? "memory.limit_in_bytes" : "memory.max"
        try TestFile(folder + "/" + limit, O_WRONLY).write(Array("\(byteCount)".utf8), at: 0)
    }

    deinit { rmdir(folder) }
}
