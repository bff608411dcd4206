internal import Foundation

/// What `Tests/run` and the machine tell the tests.
package enum TestEnvironment {
    /// The program under test: `QCOWFS` in the environment, or the release build of this package.
    package static let program: String =
        variable("QCOWFS") ?? packageFolder + "/.build/release/qcowfs"

    /// The folder that holds Package.swift.
    package static let packageFolder: String = URL(fileURLWithPath: #filePath)
        .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent().path

    /// Whether the longer form of the random runs was asked for (`Tests/run --long`).
    package static let isLong = variable("QCOWFS_TEST_LONG") == "1"

    /// The seed of this run (`Tests/run --seed N`); fixed where none is given.
    package static let seed = UInt64(variable("QCOWFS_TEST_SEED") ?? "") ?? 20_26

    /// Where images of the tests live: memory, where there is some.
    package static let scratch: String =
        variable("QCOWFS_TEST_SCRATCH")
        ?? (access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp")

    /// Whether a FUSE file system can be mounted here.
    package static let canMount: Bool =
        access("/dev/fuse", W_OK) == 0

    /// Whether loop devices can be attached and file systems mounted on them.
    package static let canLoop: Bool =
        canMount && geteuid() == 0 && access("/dev/loop-control", W_OK) == 0

    package static func has(_ tools: String...) -> Bool {
        let path = (variable("PATH") ?? "") + ":/usr/sbin:/sbin"
        let folders = path.split(separator: ":").map(String.init)
        return tools.allSatisfy { tool in
            folders.contains { access("\($0)/\(tool)", X_OK) == 0 }
        }
    }

    private static func variable(_ name: String) -> String? {
        ProcessInfo.processInfo.environment[name]
    }
}
