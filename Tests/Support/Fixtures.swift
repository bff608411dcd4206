internal import Glibc

/// Every kind of image of the format's test recipes.
package enum Fixtures {
    package static let all: [Fixture] =
        plain + refcounts + clusters + preallocated + compressed + kept + layered + extended
        + outside + encrypted

    private static let sizes = ["512", "4k", "64k", "2M"]

    /// Data, zeros and holes of every cluster size, in both versions.
    private static let plain: [Fixture] = ["0.10", "1.1"].flatMap { version in
        sizes.map { clusterSize in
            Fixture("version \(version), clusters of \(clusterSize)") { made in
                try made.create(
                    ["compat=\(version)", "cluster_size=\(clusterSize)"],
                    size: clusterSize == "2M" ? 24.MiB : 4.MiB)
                try made.io(
                    "write -P 0x11 0 100k", "write -P 0x22 1M 64k", "write -P 0x33 1200k 8k",
                    "discard 1M 32k", "write -z 64k 16k", "write -P 0x44 3000k 1k")
            }
        }
    }

    private static let refcounts: [Fixture] =
        [1, 2, 4, 8, 32, 64].map { bits in
            Fixture("\(bits)-bit refcounts") { made in
                try made.create(["refcount_bits=\(bits)", "cluster_size=4k"])
                try made.io("write -P 0x11 0 1M", "discard 64k 64k")
            }
        } + [
            Fixture("lazy refcounts") { made in
                try made.create(["lazy_refcounts=on"])
                try made.io("write -P 0x11 128k 128k")
            }
        ]

    /// Each state of a cluster.
    private static let clusters: [Fixture] = [
        Fixture("zero clusters with and without space") { made in
            try made.create()
            try made.io(
                "write -P 0x11 0 1M", "write -z 64k 64k", "write -z -u 192k 128k",
                "write -z 2M 128k", "discard 512k 128k", "write 3200k 64k", "write 3M 64k",
                "write 3136k 64k", "write -z 3M 192k")
        },
        Fixture("an entry patched to read as zeros, not COPIED") { made in
            try made.create()
            try made.io("write -P 0x11 0 192k")
            let file = try TestFile(made.image, O_RDWR)
            // The second entry of the first L2 table: 0x8000000000060000.
            var entry = try file.read(0x40008..<0x40010)
            entry[0] = 0
            entry[7] = 1
            try file.write(entry, at: 0x40008)
        },
        Fixture("a disk that does not end with its last cluster") { made in
            try made.create(size: 4.MiB + 1536)
            try made.io("write -P 0x11 4M 1536", "write -P 0x22 3M 1k")
        },
        Fixture("a large disk with little on it") { made in
            try made.create(size: 8 << 40)
            try made.io("write -P 0x11 5T 64k", "write -P 0x22 8191G 64k")
        },
        Fixture("an empty disk of no bytes") { made in try made.create(size: 0) },
    ]

    private static let preallocated: [Fixture] = ["metadata", "falloc", "full"].map { mode in
        Fixture("preallocation of \(mode)") { made in
            try made.create(["preallocation=\(mode)"])
            try made.io("write -P 0x11 1M 64k", "write -z 2M 64k")
        }
    }

    private static let compressed: [Fixture] =
        sizes.flatMap { size in
            ["zlib", "zstd"].map { type in
                Fixture("compressed with \(type), clusters of \(size)") { made in
                    try convert(
                        made, ["-c", "-o", "cluster_size=\(size),compression_type=\(type)"])
                }
            }
        } + [
            Fixture("compressed out of order") { made in
                try convert(made, ["-c", "-W", "-m", "8"])
            },
            Fixture("compressed without shared clusters") { made in
                try convert(made, ["-c", "-o", "refcount_bits=1"])
            },
            Fixture("compressed one by one, some written over") { made in
                try made.create()
                try made.io(
                    "write -c -P 0x11 0 64k", "write -c -P 0x22 64k 64k",
                    "write -c -P 0x33 256k 64k",
                    "write -P 0x44 70k 2k", "discard 256k 64k", "write -c -P 0x55 512k 64k")
            },
        ]

    /// Compressible text, noise and holes.
    private static func convert(_ made: Fixture.Made, _ flags: [String]) throws {
        let disk = ReferenceDisk(byteCount: 6.MiB)
        var random = RepeatableRandom(seed: 5)
        for offset in stride(from: 0, to: 5.MiB, by: 8) {
            // A quarter of the disk is noise, some of it is left out.
            let isNoise = offset / 256.KiB % 4 == 1
            if offset / 512.KiB % 5 == 4 { continue }
            let number = isNoise ? random.next() : random.next() & 0x0f0f
            disk.bytes.storeBytes(of: number, toByteOffset: offset, as: UInt64.self)
        }
        let raw = made.folder.file("source.raw")
        try disk.save(to: raw)
        try QemuImg.convert(raw, to: made.image, flags: flags)
    }

    /// What lies beside the disk.
    private static let kept: [Fixture] = [
        Fixture("snapshots, one of them deleted, one applied") { made in
            try made.create()
            try made.io("write -P 0x11 0 256k")
            try QemuImg.snapshot(made.image, create: "one")
            try made.io("write -P 0x22 128k 256k", "write -z 0 64k")
            try QemuImg.snapshot(made.image, create: "two")
            try made.io("discard 64k 64k")
            try QemuImg.snapshot(made.image, create: "three")
            try Command.require("qemu-img", "snapshot", "-q", "-d", "two", made.image)
            try made.io("write -P 0x33 1M 64k")
            try Command.require("qemu-img", "snapshot", "-q", "-a", "three", made.image)
        },
        Fixture("bitmaps, one of them disabled") { made in
            try made.create()
            try Command.require("qemu-img", "bitmap", "--add", "-g", "65536", made.image, "b1")
            try Command.require("qemu-img", "bitmap", "--add", "--disable", made.image, "b2")
            try made.io("write -P 0x11 1M 1M")
        },
    ]

    private static let layered: [Fixture] = [
        Fixture("a qcow2 backing file that is shorter") { made in
            let base = made.folder.file("base.qcow2")
            try QemuImg.create(base, size: 2.MiB, options: ["cluster_size=4k"])
            try QemuImg.io(base, ["write -P 0x77 0 1M", "write -z 256k 64k"])
            try QemuImg.create(made.image, size: 4.MiB, backing: "base.qcow2")
            try made.io("write -P 0x11 64k 64k", "discard 192k 64k", "write -P 0x22 3M 4k")
        },
        Fixture("a raw backing file of an odd length, with holes") { made in
            let base = made.folder.file("base.raw")
            let disk = ReferenceDisk(byteCount: 1_100_001)
            disk[0..<200_000].initializeMemory(as: UInt8.self, repeating: 0x77)
            disk[1_000_000..<1_100_001].initializeMemory(as: UInt8.self, repeating: 0x78)
            try disk.save(to: base)
            try QemuImg.create(
                made.image, size: 4.MiB, backing: "base.raw", backingFormat: "raw")
            try made.io("write -P 0x11 64k 4k", "write -z 640k 64k")
        },
        Fixture("a chain of four, of both versions") { made in
            for layer in 1...4 {
                let path = layer == 4 ? made.image : made.folder.file("layer\(layer).qcow2")
                try QemuImg.create(
                    path, size: (layer == 2 ? 3 : 4).MiB,
                    options: [
                        "compat=\(layer % 2 == 0 ? "1.1" : "0.10")",
                        "cluster_size=\(4096 << layer)",
                    ], backing: layer == 1 ? nil : "layer\(layer - 1).qcow2")
                try QemuImg.io(
                    path,
                    [
                        "write -P \(layer) \(layer * 512)k 700k", "write -z \(layer * 600)k 100k",
                    ])
            }
        },
    ]
}

// MARK: - What not every image has

extension Fixtures {
    private static let extended: [Fixture] = [
        Fixture("extended L2 entries", [.extendedL2]) { made in
            try made.create(["extended_l2=on"])
            try made.io(
                "write -P 0x11 2k 4k", "write -z 8k 2k", "write -P 0x22 64k 64k",
                "write -z 70k 6k", "discard 128k 64k", "write -P 0x33 1M 2k",
                "write -c -P 0x44 2M 64k", "write -P 0x55 2050k 1k")
        },
        Fixture("extended L2 entries over a backing file", [.extendedL2]) { made in
            let base = made.folder.file("base.qcow2")
            try QemuImg.create(base, size: 3.MiB)
            try QemuImg.io(base, ["write -P 0x77 0 3M"])
            try QemuImg.create(
                made.image, size: 4.MiB, options: ["extended_l2=on", "cluster_size=128k"],
                backing: "base.qcow2")
            try made.io(
                "write -P 0x11 4k 6k", "write -z 32k 4k", "discard 256k 128k", "write -z 400k 20k")
        },
        Fixture("extended L2 entries, preallocated over a backing file", [.extendedL2]) { made in
            let base = made.folder.file("base.qcow2")
            try QemuImg.create(base, size: 4.MiB)
            try QemuImg.io(base, ["write -P 0x77 0 1M"])
            try QemuImg.create(
                made.image, size: 4.MiB, options: ["extended_l2=on", "preallocation=metadata"],
                backing: "base.qcow2")
            try made.io("write -P 0x11 6k 2k")
        },
    ]

    private static let outside: [Fixture] = [
        Fixture("an external data file", [.dataFile]) { made in
            try made.create(["data_file=\(made.folder.file("data"))"])
            try made.io("write -P 0x11 0 128k", "write -z 64k 64k", "write -P 0x22 3M 4k")
        },
        Fixture("a raw external data file", [.dataFile]) { made in
            try made.create(["data_file=\(made.folder.file("data"))", "data_file_raw=on"])
            try made.io("write -P 0x11 0 128k", "write -z 64k 64k", "write -P 0x22 3M 4k")
        },
    ]

    private static let encrypted: [Fixture] = [
        Fixture("LUKS", [.luks]) { made in
            try createEncrypted(made, ["encrypt.format=luks", "encrypt.iter-time=10"])
        },
        Fixture("LUKS with a shorter key", [.luks]) { made in
            try createEncrypted(
                made,
                [
                    "encrypt.format=luks", "encrypt.iter-time=10", "encrypt.cipher-alg=aes-128",
                    "encrypt.cipher-mode=cbc", "encrypt.ivgen-alg=essiv",
                    "encrypt.ivgen-hash-alg=sha256", "encrypt.hash-alg=sha1",
                ])
        },
        Fixture("AES", [.aes]) { made in try createEncrypted(made, ["encrypt.format=aes"]) },
    ]

    private static func createEncrypted(_ made: Fixture.Made, _ options: [String]) throws {
        try Command.require(
            ["qemu-img", "create", "-q", "-f", "qcow2"] + QemuImg.secret(Fixture.Made.passphrase)
                + ["-o", (options + ["encrypt.key-secret=s"]).joined(separator: ","), made.image]
                + ["4M"])
        try made.io("write -P 0x11 0 100k", "write -z 64k 64k", "write -P 0x22 3M 4k")
    }
}
