// swift-tools-version: 6.2
import PackageDescription

let settings: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("MemberImportVisibility"),
]
/// Shows Swift what glibc hides by default: fallocate, SEEK_HOLE, O_DIRECT, OFD locks.
let gnu: [CSetting] = [.define("_GNU_SOURCE")]

let package = Package(
    name: "qcowfs",
    products: [
        .library(name: "QCOW2", targets: ["QCOW2"]),
        .library(name: "ImageMount", targets: ["ImageMount"]),
        .executable(name: "qcowfs", targets: ["qcowfs"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
    ],
    targets: [
        // Doors to C, one library each.
        .systemLibrary(
            name: "CFuse3", path: "Modules/CFuse3", pkgConfig: "fuse3",
            providers: [.apt(["libfuse3-dev"])]),
        .systemLibrary(
            name: "CDeflate", path: "Modules/CDeflate", pkgConfig: "libdeflate",
            providers: [.apt(["libdeflate-dev"])]),
        .systemLibrary(
            name: "CZlib", path: "Modules/CZlib", pkgConfig: "zlib",
            providers: [.apt(["zlib1g-dev"])]),
        .systemLibrary(
            name: "CZstd", path: "Modules/CZstd", pkgConfig: "libzstd",
            providers: [.apt(["libzstd-dev"])]),
        .systemLibrary(
            // No pkgConfig: it would link what is opened at run time.
            name: "CCrypto", path: "Modules/CCrypto", providers: [.apt(["libssl-dev"])]),
        .systemLibrary(
            name: "CNettle", path: "Modules/CNettle", pkgConfig: "nettle",
            providers: [.apt(["nettle-dev"])]),
        .systemLibrary(name: "CLinux", path: "Modules/CLinux"),

        // The layers, lowest first.
        .target(
            name: "QCOW2",
            dependencies: [
                "CDeflate", "CZlib", "CZstd", "CCrypto", "CNettle", "CLinux",
                .product(name: "Logging", package: "swift-log"),
            ],
            cSettings: gnu, swiftSettings: settings),
        .target(
            name: "ImageMount",
            dependencies: ["QCOW2", "CFuse3", .product(name: "Logging", package: "swift-log")],
            cSettings: gnu, swiftSettings: settings),
        .target(name: "CStart"),
        .executableTarget(
            name: "qcowfs",
            dependencies: [
                "QCOW2", "ImageMount", "CStart",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ],
            cSettings: gnu, swiftSettings: settings),
        // Whole programs over the library's public face.
        .executableTarget(
            name: "sparse-copy", dependencies: ["QCOW2"], path: "examples/sparse-copy",
            swiftSettings: settings),
        .executableTarget(
            name: "raw-disk", dependencies: ["QCOW2"], path: "examples/raw-disk",
            swiftSettings: settings),
        .executableTarget(
            name: "inspect-image", dependencies: ["QCOW2"], path: "examples/inspect-image",
            swiftSettings: settings),
        .executableTarget(
            name: "mount-image",
            dependencies: ["ImageMount", .product(name: "Logging", package: "swift-log")],
            path: "examples/mount-image", swiftSettings: settings),

        // What tests share, and a folder of tests for each target.
        .target(name: "CTurns", path: "Tests/Turns", cSettings: gnu),
        .target(
            name: "TestSupport", dependencies: ["QCOW2", "CNettle", "CZlib", "CZstd", "CTurns"],
            path: "Tests/Support",
            cSettings: gnu, swiftSettings: settings),
        .testTarget(
            name: "QCOW2Tests", dependencies: ["QCOW2", "TestSupport", "CZlib", "CZstd"],
            cSettings: gnu, swiftSettings: settings),
        .testTarget(
            name: "ImageMountTests", dependencies: ["ImageMount", "QCOW2", "TestSupport"],
            cSettings: gnu, swiftSettings: settings),
        .testTarget(
            name: "qcowfsTests", dependencies: ["TestSupport", "QCOW2"], cSettings: gnu,
            swiftSettings: settings),
    ],
    swiftLanguageModes: [.v6]
)
