import Foundation
import TestSupport
import Testing

/// File systems in a mounted image, through loop devices: what people do with it.
@Suite("File systems", .serialized, .enabledWhereLoopable)
struct FileSystemTests {
    /// Where a partition lies in a disk, in bytes.
    struct Partition {
        let offset: Int
        let byteCount: Int
    }

    /// The first partition of a disk, from sfdisk: this works where the kernel reads no tables.
    private func partition(of disk: String) throws -> Partition {
        struct Listing: Decodable {
            struct Table: Decodable {
                struct Entry: Decodable {
                    let start: Int
                    let size: Int
                }
                let partitions: [Entry]
            }
            let partitiontable: Table
        }
        let json = try Command.require("sfdisk", "--json", disk)
        let table = try JSONDecoder().decode(Listing.self, from: Data(json.utf8)).partitiontable
        let first = try #require(table.partitions.first)
        return Partition(offset: first.start * 512, byteCount: first.size * 512)
    }

    /// Copies some of the machine's own files, links and directories included.
    private func fill(_ target: String) throws -> Int {
        let most = TestEnvironment.isLong ? 25_000 : 4_000
        let largest = TestEnvironment.isLong ? 16 : 3
        // Small files and large ones, in the order of the tree; the same ones on every run.
        try Command.shell(
            """
            cd /usr
            find bin sbin lib share/doc share/zoneinfo share/perl include -xdev \
                \\( -type f -size -\(largest)M -o -type l \\) 2>/dev/null \
                | LC_ALL=C sort | awk 'NR % 3 == 1 && NR <= 3 * \(most)' > \(target).list
            tar cf - -T \(target).list | tar xf - -C \(target)
            """, timeout: 600)
        let list = try String(contentsOfFile: target + ".list", encoding: .utf8)
        return list.split(separator: "\n").count
    }

    /// One line a file: its checksum and name.
    private func checksums(_ folder: String) throws -> String {
        try Command.shell(
            "cd \(folder) && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum",
            timeout: 600)
    }

    @Test("a disk full of real files is compared, changed, checked and mounted again")
    func realFiles() throws {
        let folder = try TemporaryDirectory(in: "/tmp")
        let image = folder.file("disk.qcow2")
        let sums = try makeDisk(image, folder)
        let first = try TestMount(image, in: folder)
        let partition = try partition(of: first.disk)
        let changed = try change(first, partition, folder, expecting: sums)
        try first.unmount()
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")

        let second = try TestMount(image, in: folder)
        let loop = try LoopDevice(
            second.disk, offset: partition.offset, byteCount: partition.byteCount)
        try Command.require("e2fsck", "-f", "-n", loop.path, timeout: 300)
        let mounted = try FileSystemMount(loop.path, on: folder.file("fs"), options: "ro")
        #expect(try checksums(mounted.path) == changed, "the second mount differs")
        try mounted.unmount()
        try loop.detach()
        try second.unmount()
    }

    /// A qcow2 image, made by qemu-img, of a partitioned disk with ext4 and files.
    private func makeDisk(_ image: String, _ folder: TemporaryDirectory) throws -> String {
        let raw = folder.file("disk.raw")
        let size = TestEnvironment.isLong ? 4096 : 1024
        try Command.require("truncate", "-s", "\(size)M", raw)
        try Command.shell("printf 'label: gpt\\nstart=2048\\n' | sfdisk -q \(raw)")
        let partition = try partition(of: raw)
        let loop = try LoopDevice(raw, offset: partition.offset, byteCount: partition.byteCount)
        try Command.require("mkfs.ext4", "-q", "-F", loop.path, timeout: 300)
        let mounted = try FileSystemMount(loop.path, on: folder.file("fs"))
        let count = try fill(mounted.path)
        let sums = try checksums(mounted.path)
        try mounted.unmount()
        try loop.detach()
        try QemuImg.convert(raw, to: image)
        unlink(raw)
        print("• a disk with \(count) files and links of /usr")
        return sums
    }

    private func change(
        _ mount: TestMount, _ partition: Partition, _ folder: TemporaryDirectory,
        expecting sums: String
    ) throws -> String {
        let loop = try LoopDevice(
            mount.disk, offset: partition.offset, byteCount: partition.byteCount)
        let mounted = try FileSystemMount(loop.path, on: folder.file("fs"))
        #expect(try checksums(mounted.path) == sums, "the files differ from those that went in")
        try Command.shell(
            """
            cd \(mounted.path)
            find . -type f | LC_ALL=C sort | awk 'NR % 5 == 0' | xargs -d '\\n' rm -f
            find . -type f | LC_ALL=C sort | awk 'NR % 7 == 0' \
                | while read -r file; do echo changed >> "$file"; done
            mkdir new && cp -r /etc/. new/ 2>/dev/null || true
            dd if=/dev/urandom of=new/random bs=1M count=40 status=none
            sync
            """, timeout: 600)
        let changed = try checksums(mounted.path)
        try mounted.unmount()
        try Command.require("e2fsck", "-f", "-n", loop.path, timeout: 300)
        try loop.detach()
        return changed
    }

    @Test(
        "survives fio with verify, fstrim and fsck, and the image shrinks",
        arguments: ["ext4", "xfs"])
    func fio(kind: String) throws {
        let folder = try TemporaryDirectory(in: "/tmp")
        let image = folder.file("disk.qcow2")
        try QemuImg.create(image, size: 1024.MiB)
        let mount = try TestMount(image, in: folder)
        let loop = try LoopDevice(mount.disk)
        if kind == "ext4" {
            try Command.require("mkfs.ext4", "-q", "-F", loop.path, timeout: 300)
        } else {
            try Command.require("mkfs.xfs", "-q", "-f", loop.path, timeout: 300)
        }
        let mounted = try FileSystemMount(loop.path, on: folder.file("fs"))
        let size = TestEnvironment.isLong ? 400 : 96
        try Command.require(
            "fio", "--name=verify", "--directory=\(mounted.path)", "--rw=randwrite",
            "--bsrange=4k-64k",
            "--size=\(size)M", "--numjobs=2", "--verify=crc32c", "--verify_fatal=1",
            "--do_verify=1",
            "--fsync=200", "--randseed=\(TestEnvironment.seed)", "--group_reporting",
            "--output=/dev/null", timeout: 600)
        try Command.require("sync", "-f", mounted.path)
        let full = try blocks(image)
        try Command.shell("rm \(mounted.path)/verify*")
        try mounted.unmount()
        // Mounted anew, so that nothing which xfs still means to free is left out.
        let trimmed = try FileSystemMount(loop.path, on: folder.file("fs"))
        try Command.require("fstrim", trimmed.path, timeout: 300)
        try trimmed.unmount()
        if kind == "ext4" {
            try Command.require("e2fsck", "-f", "-n", loop.path, timeout: 300)
        } else {
            try Command.require("xfs_repair", "-n", loop.path, timeout: 300)
        }
        try loop.detach()
        try mount.unmount()
        let empty = try blocks(image)
        print(
            "• \(kind): the image takes \(full / 2048) MiB full, \(empty / 2048) MiB after fstrim")
        #expect(empty < full - size * 2048, "fstrim gave nothing back")
        let check = try QemuImg.check(image)
        #expect(check.status == 0, "\(check)")
    }

    private func blocks(_ path: String) throws -> Int {
        Int(try TestFile(path, O_RDONLY).status().st_blocks)
    }

    @Test("mkfs straight onto the file, and debugfs reads it back through QEMU")
    func mkfsOnFile() throws {
        let folder = try TemporaryDirectory()
        let image = folder.file("disk.qcow2")
        try QemuImg.create(image, size: 256.MiB, options: ["cluster_size=4096"])
        let mount = try TestMount(image, in: folder)
        try Command.require(
            "mkfs.ext4", "-q", "-F", "-d", "/usr/share/perl", mount.disk, timeout: 300)
        try Command.require("e2fsck", "-f", "-n", mount.disk, timeout: 300)
        try mount.unmount()
        #expect(try QemuImg.check(image).status == 0)
        let raw = folder.file("disk.raw")
        try QemuImg.convert(image, to: raw, from: "qcow2", format: "raw")
        try Command.require("e2fsck", "-f", "-n", raw, timeout: 300)
    }
}
